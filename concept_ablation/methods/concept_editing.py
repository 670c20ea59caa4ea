"""Concept Editing (UCE, Gandikota et al., WACV 2024) as mathematics: keys and values of the text edited in closed form.

Of each projection W_0, (out, width), and encodings c of a target's tokens, c* of the anchor's and p of what is preserved, columns of
length width, the new weights are the least of

    s_e sum |W c - W_0 c*|^2 + s_p sum |W p - W_0 p|^2 + lambda |W - W_0|^2
    W = (lambda W_0 + s_e sum W_0 c* c^T + s_p sum W_0 p p^T) (lambda I + s_e sum c c^T + s_p sum p p^T)^-1

Which tokens count is `tokens`: the subject's last one, as in the published code today, or that one and all after it, padding too, as in
its first version. Methods and a bundle's way read this module; the settings are theirs alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

SCALE = {"type": "number", "exclusiveMinimum": 0}
TEMPLATES: Mapping[str, object] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "pattern": r"^[^{}]*\{\}[^{}]*$"},
    "description": "texts in which words are encoded, with {} for the word",
}
"""The schema of a setting `templates`."""
DEFAULTS: Mapping[str, object] = {
    "templates": ["{}"],
    "tokens": "last",
    "erase_scale": 1.0,
    "preserve_scale": 1.0,
    "ridge": 0.5,
}
"""Those of the published code."""
SCHEMA: Mapping[str, Mapping] = {
    "templates": TEMPLATES,
    "tokens": {
        "enum": ["last", "rest"],
        "description": "the subject's last token, or it and all after it",
    },
    "erase_scale": {**SCALE, "description": "s_e, above 0"},
    "preserve_scale": {**SCALE, "description": "s_p, above 0"},
    "ridge": {**SCALE, "description": "lambda, above 0: how much the weights stay as they are"},
}


def projections(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights, (out, width), that make keys and values of the text, by their names in a delta."""
    from concept_ablation.diffusion.families.base import family_of

    family = family_of(pipeline)
    layers = family.text_projections(family.network(pipeline))
    return {f"{family.network_name}.{name}.weight": layer.weight.detach() for name, layer in layers.items()}


def encodings(
    spec: Mapping, pipeline: DiffusionPipeline, templates: Sequence[str], tokens: str
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """A row's pairs of targets' tokens and the anchor's in their place, and the tokens of what is to stay: anchor and neighbors."""
    pairs, kept = [], []
    for template in templates:
        subjects = Subjects(pipeline, template, tokens)
        pairs += [subjects.pair(target, spec["anchor"]) for target in spec["targets"]]
        kept += [subjects.of(word) for word in (spec["anchor"], *spec["neighbors"])]
    return pairs, kept


class Subjects:
    """The encodings of words in a template's place, (tokens, width): of their last token, or of it and all after it."""

    def __init__(self, pipeline: DiffusionPipeline, template: str, tokens: str) -> None:
        from concept_ablation.methods.ablation.conditioning import Encoder

        self.encoder, self.template, self.rest = Encoder(pipeline), template, tokens == "rest"
        self.tokenizer = next(iter(self.encoder.family.tokenizers(pipeline).values()))

    def of(self, word: str) -> Tensor:
        """A word's own tokens."""
        hidden, last = self._encode(word)
        return hidden[last:] if self.rest else hidden[last : last + 1]

    def pair(self, target: str, anchor: str) -> tuple[Tensor, Tensor]:
        """The target's tokens, and the anchor's in their place: as many, both from the last of the subject on."""
        parts = self.of(target), self.of(anchor)
        count = min(map(len, parts))
        return parts[0][:count], parts[1][:count]

    def _encode(self, word: str) -> tuple[Tensor, int]:
        text = self.template.replace("{}", word)
        (hidden,) = self.encoder.text([text]).hidden
        # The subject ends where the text up to it ends; after that come the rest of the template, end-of-text and padding.
        upto = self.template.partition("{}")[0] + word
        last = len(self.tokenizer(upto, truncation=True).input_ids) - 2
        return hidden, max(0, min(last, len(hidden) - 1))


def edit(
    weight: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    kept: Sequence[Tensor],
    erase_scale: float,
    preserve_scale: float,
    ridge: float,
) -> Tensor:
    """The edited weights, (out, width), as this module's formula has them; computed in float64.

    pairs: encodings of targets' tokens and of those that take their place, (tokens, width) each, row by row. kept: of what is to stay.
    """
    import torch

    old = weight.double()
    system = ridge * torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    moved = torch.zeros_like(old)
    for target, anchor in ((one.double(), other.double()) for one, other in pairs):
        system += erase_scale * target.T @ target
        moved += erase_scale * (old @ (anchor - target).T) @ target
    for own in (tokens.double() for tokens in kept):
        system += preserve_scale * own.T @ own
    # W - W_0 = s_e sum W_0 (c* - c) c^T S^-1, since what is preserved and the ridge ask for W_0 itself.
    change = torch.linalg.solve(system, moved.T).T
    return (old + change).to(weight.dtype)
