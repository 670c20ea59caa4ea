"""Preservation: what a row's training keeps as it is, and the null space that keeps it exactly.

*Preserved prompts* are the anchor's, those that name each neighbor, and a general set. Two ways keep what they give:

- *distillation* (`objective`): a loss that holds the network's predictions for them to those of the unchanged network;
- the *null space*: keys and values are linear in the text's encoding h, so a change D of their weights leaves those prompts as
  they were wherever D h = 0. After each optimizer step the change is projected onto the matrices with this property.

AlphaEdit (Fang et al., 2025) and SPEED (Li et al., 2025) project closed-form edits in this way; here each step of a training is
projected.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.methods.ablation.settings import TrainingError
from concept_ablation.prompts.stage import read_prompts
from concept_ablation.prompts.templates import subsample_evenly
from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS

if TYPE_CHECKING:
    from concept_ablation.methods.ablation.conditioning import Encoder


def preserved_prompts(spec: Mapping, anchor_prompts: Sequence[str]) -> list[str]:
    """A row's preserved prompts, each once: the anchor's, each neighbor's, the general ones of `spec["preserve_prompts"]`.

    A general prompt that names a target is left out, since the target is to go.
    """
    kind, templates = KINDS[spec["kind"]], spec["training"]["style_templates"]
    own = list(dict.fromkeys(anchor_prompts))
    neighbors = kind.neighbor_prompts(own, spec["neighbors"], spec["anchor"], templates)
    general = [
        prompt
        for prompt in spec["preserve_prompts"]
        if not any(has_word(prompt, target) for target in spec["targets"])
    ]
    return list(dict.fromkeys([*own, *neighbors, *general]))


def read_rows(rows: Sequence[Mapping], keys: Sequence[str], paths: Sequence[str | Path]) -> list[dict]:
    """A spec's rows, each with its anchor's prompts and its targets' as training words them: `anchor_prompts`, `target_prompts`.

    rows: each with kind, targets, anchor, neighbors, `templates` of target prompts, `prompts`, one of `keys`, and `most_prompts` of
    the anchor that count (None: all). paths: of the files of prompts that `keys` name. Raises PromptsError.
    """
    written, found = {key: read_prompts(path) for key, path in zip(keys, paths, strict=True)}, []
    for row in rows:
        kind, own = KINDS[row["kind"]], written[row["prompts"]]
        prompts = subsample_evenly(own["prompts"], row["most_prompts"])
        if kind.searches_prompts:
            made = [own["target_prompts"]]
        else:
            made = kind.target_prompts(prompts, row["targets"], row["anchor"], row["templates"])
        targets = list(dict.fromkeys(itertools.chain.from_iterable(made)))
        found.append({**row, "anchor_prompts": prompts, "target_prompts": targets})
    return found


def prompts_of_all(
    rows: Sequence[Mapping], general: Sequence[str], gone: Sequence[str] | None = None
) -> list[str]:
    """What several rows preserve together, each prompt once; those that name a target of any row are left out.

    rows: as `read_rows` gives them. general: prompts of no row. gone: the targets that count; None: those of `rows`.
    """
    found = dict.fromkeys(general)
    for row in rows:
        own = {**row, "training": {"style_templates": row["templates"]}, "preserve_prompts": ()}
        found |= dict.fromkeys(preserved_prompts(own, row["anchor_prompts"]))
    targets = {target for row in rows for target in row["targets"]} if gone is None else set(gone)
    return [prompt for prompt in found if not any(has_word(prompt, target) for target in targets)]


def second_moment(encodings: Iterable[Tensor]) -> Tensor:
    """(width, width) float64: the mean of h h^T over all tokens h of encodings (n, tokens, width)."""
    total, count = None, 0
    for encoding in encodings:
        tokens = encoding.flatten(0, -2).double()
        moment = tokens.T @ tokens
        total, count = moment if total is None else total + moment, count + len(tokens)
    if total is None:
        raise ValueError("no encodings")
    return total / count


def span(moment: Tensor, tolerance: float) -> Tensor:
    """(width, rank): orthonormal eigenvectors of a second moment whose eigenvalues exceed `tolerance` x the largest."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors[:, values > tolerance * values[-1]]


class NullSpace:
    """Keeps the changes of linear layers' weights within the null space of what is preserved.

    `parameters`: the layers' weights, (out, width), as they are now: the change starts from these. `basis`: (width, rank),
    orthonormal, what the layers' inputs of preserved prompts span.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], basis: Tensor) -> None:
        self.parameters = list(parameters)
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.basis = basis.to(self.start[0])

    @property
    def rank(self) -> int:
        """Dimensions that are kept; the width less this is free to change."""
        return self.basis.shape[1]

    @torch.no_grad()
    def project(self) -> None:
        """Take from each change its part in the span, so that an input in the span gives what it gave."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            change = parameter - start
            parameter.copy_(start + change - (change @ self.basis) @ self.basis.T)


def null_space(
    parameters: Mapping[str, nn.Parameter],
    projections: Mapping[str, nn.Module],
    encoder: Encoder,
    prompts: Sequence[str],
    tolerance: float,
) -> NullSpace:
    """The null space of `prompts` for a training of `parameters`, by name in the network.

    `projections`: the network's layers that are linear in the text's encoding. Raises TrainingError where a parameter is no
    weight of these, or nothing is left to change.
    """
    linear = {f"{name}.weight" for name in projections}
    if other := sorted(set(parameters) - linear):
        raise TrainingError(
            f"training.preserve null-space: {other[0]} and {len(other) - 1} more parameters aren't keys and values of the text; "
            "take parameter_group cross-attn, or preserve distill"
        )
    moment = second_moment(encoder.hidden(["", *prompts]))
    found = NullSpace(list(parameters.values()), span(moment, tolerance))
    if found.rank == found.basis.shape[0]:
        raise TrainingError(
            f"training.preserve null-space: the {len(prompts)} preserved prompts span all {found.rank} dimensions of the text's "
            f"encoding at tolerance {tolerance}, so nothing can change; take a larger preserve_tolerance, or distill"
        )
    return found
