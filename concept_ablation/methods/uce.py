"""Method `uce`: Unified Concept Editing (Gandikota et al., WACV 2024), keys and values of the text edited in closed form.

Of each projection W_0, (out, width), and encodings c of a target's tokens, c* of the anchor's and p of what is preserved, columns of
length width, the new weights are the least of

    s_e sum |W c - W_0 c*|^2 + s_p sum |W p - W_0 p|^2 + lambda |W - W_0|^2
    W = (lambda W_0 + s_e sum W_0 c* c^T + s_p sum W_0 p p^T) (lambda I + s_e sum c c^T + s_p sum p p^T)^-1

No picture is drawn and nothing is trained. Which tokens count is `tokens`: the subject's last one, as in the published code today, or
that one and all after it, padding too, as in its first version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.methods.base import Method

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

SCALE = {"type": "number", "exclusiveMinimum": 0}


class Uce(Method):
    """Its defaults are those of the published code; preserved are the row's anchor and its neighbors."""

    name = "uce"
    uses_anchors = False
    row_fields = ("kind", "targets", "anchor", "neighbors")
    defaults: ClassVar = {
        "templates": ["{}"],
        "tokens": "last",
        "erase_scale": 1.0,
        "preserve_scale": 1.0,
        "ridge": 0.5,
    }
    schema: ClassVar = {
        "templates": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "pattern": r"^[^{}]*\{\}[^{}]*$"},
            "description": "texts in which targets, anchor and neighbors are encoded, with {} for the word",
        },
        "tokens": {
            "enum": ["last", "rest"],
            "description": "the subject's last token, or it and all after it",
        },
        "erase_scale": {**SCALE, "description": "s_e, above 0"},
        "preserve_scale": {**SCALE, "description": "s_p, above 0"},
        "ridge": {**SCALE, "description": "lambda, above 0: how much the weights stay as they are"},
    }

    def groups(self, settings: Mapping) -> set[str]:
        return {"cross-attn"}

    def run(
        self,
        spec: Mapping,
        anchors: str | Path | None,
        delta: str | Path,
        training: str | Path,
        *,
        device: str,
        checkpoint_steps: int,
    ) -> None:
        from concept_ablation.diffusion.families.base import family_of
        from concept_ablation.diffusion.stages import load_model

        settings, pipeline = self.settings_of(spec), load_model(spec["model"], device)
        family = family_of(pipeline)
        pairs, kept = [], []
        for template in settings["templates"]:
            tokens = Subjects(pipeline, template, settings["tokens"])
            pairs += [tokens.pair(target, spec["anchor"]) for target in spec["targets"]]
            kept += [tokens.of(word) for word in (spec["anchor"], *spec["neighbors"])]
        scales = settings["erase_scale"], settings["preserve_scale"], settings["ridge"]
        layers = family.text_projections(family.network(pipeline))
        edited = {
            f"{family.network_name}.{name}.weight": edit(layer.weight.detach(), pairs, kept, *scales)
            for name, layer in layers.items()
        }
        self.save(spec, edited, delta, training)


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


METHOD = Uce()
