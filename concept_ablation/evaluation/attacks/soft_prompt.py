"""Attack `soft-prompt`: token embeddings in the target's place, learned so that the model draws the base model's pictures again.

Concept inversion (Pham et al. 2024, "Circumventing Concept Erasure Methods For Text-to-Image Generative Models"), which is textual
inversion (Gal et al. 2023) against the ablated model. It is the stronger attack: its embeddings need be no word's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from concept_ablation.common.progress import progress_bar
from concept_ablation.evaluation.attacks.base import Attack, Goal, Learned


class SoftPrompt(Attack):
    """Adam on the embeddings alone, from those of the target's own tokens."""

    name = "soft-prompt"
    replaces_target = True

    def learn(self, goal: Goal, start: str, settings: Mapping) -> Learned:
        tables, tokens = goal.tables(), goal.tokens(start)
        rows, groups = {}, []
        for name, table in tables.items():
            ids = [tokens[name][place % len(tokens[name])] for place in range(settings["tokens"])]
            rows[name] = table[torch.tensor(ids, device=table.device)].clone().requires_grad_()
            # In units of the vocabulary's own spread, so that one value serves all text encoders.
            groups.append({"params": [rows[name]], "lr": settings["learning_rate"] * float(table.std())})
        optimizer, losses = torch.optim.Adam(groups), []
        with progress_bar(total=settings["steps"], desc=f"{self.name}, {start}", unit="step") as bar:
            for _ in range(settings["steps"]):
                loss = goal.loss(rows, goal.draw(settings["batch_size"]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                bar.update(1)
        return Learned({name: values.detach() for name, values in rows.items()}, losses=losses)


ATTACK = SoftPrompt()
