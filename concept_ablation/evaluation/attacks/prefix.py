"""Attack `prefix`: a few real words before the prompt, learned so that the model draws the base model's pictures again.

The loss is that of UnlearnDiffAtk (Zhang et al. 2024, "To Generate or Not?", equation 5): the ablated network's own error on pictures
of the target, so that no other network is needed. The words are found by projected gradient descent (Wen et al. 2023, "Hard Prompts
Made Easy"): the gradient is taken at real tokens, moves a free point, and the nearest real tokens are tried next. Other than
UnlearnDiffAtk, which attacks each prompt alone, one prefix has to serve all prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from concept_ablation.common.progress import progress_bar
from concept_ablation.evaluation.attacks.base import Attack, AttackError, Goal, Learned

COMPARED = 16
"""Pictures, timesteps and noise by which the prefixes that were tried are compared: the same for all of them."""


class Prefix(Attack):
    """Of all prefixes that come by, the one with the least loss on fixed draws is kept."""

    name = "prefix"
    replaces_target = False

    def learn(self, goal: Goal, start: str, settings: Mapping) -> Learned:
        tables = goal.tables()
        if len(tables) != 1:
            raise AttackError(
                f"attack prefix: the model has {len(tables)} text encoders, whose tokens may differ (allowed: one; use soft-prompt)"
            )
        ((encoder, table),) = tables.items()
        tokenizer = goal.family.tokenizers(goal.pipeline)[encoder]
        allowed = torch.tensor(typable(tokenizer, len(table)), device=table.device)
        words = torch.nn.functional.normalize(table[allowed], dim=1)
        chosen = torch.randint(len(allowed), (settings["tokens"],), generator=goal.generator)
        free = table[allowed[chosen.to(table.device)]].clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=settings["learning_rate"] * float(table.std()))
        compared = goal.draw(COMPARED)
        tried: dict[tuple[int, ...], float] = {}
        losses = []
        with progress_bar(total=settings["steps"], desc=f"{self.name}, {start}", unit="step") as bar:
            for _ in range(settings["steps"]):
                ids = allowed[nearest(free, words)]
                if (found := tuple(ids.tolist())) not in tried:
                    with torch.no_grad():
                        tried[found] = float(goal.loss({encoder: table[ids]}, compared))
                point = table[ids].clone().requires_grad_()
                loss = goal.loss({encoder: point}, goal.draw(settings["batch_size"]))
                (free.grad,) = torch.autograd.grad(loss, point)
                optimizer.step()
                losses.append(loss.item())
                bar.update(1)
        best = min(tried, key=tried.get)
        text = " ".join(tokenizer.decode([number]).strip() for number in best)
        return Learned({encoder: table[list(best)]}, text, losses)


def nearest(points: Tensor, words: Tensor) -> Tensor:
    """(k,): the number of the word with the largest cosine to each point. points (k, width); words (n, width), of length 1."""
    return (torch.nn.functional.normalize(points.detach(), dim=1) @ words.T).argmax(dim=1)


def typable(tokenizer: Any, size: int) -> list[int]:
    """The ids below `size` of whole words: what they say, typed alone, gives the same token again. Raises AttackError if none is."""
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    numbers = [number for number in range(min(size, len(tokenizer))) if number not in added]
    texts = [text.strip() for text in tokenizer.batch_decode([[number] for number in numbers])]
    again = tokenizer([text or "." for text in texts], add_special_tokens=False).input_ids
    found = [
        number
        for number, text, ids in zip(numbers, texts, again, strict=True)
        if ids == [number] and text.isprintable() and any(letter.isalnum() for letter in text)
    ]
    if not found:
        raise AttackError("attack prefix: the tokenizer has no token that is a whole word (use soft-prompt)")
    return found


ATTACK = Prefix()
