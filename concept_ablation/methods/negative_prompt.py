"""Method `negative-prompt`: nothing is trained; guidance leads away from the target instead of from the empty prompt while sampling.

It is what every user tries first, and needs nothing but a setting of the sampler: eps = eps(x, "owl") + g (eps(x, prompt) - eps(x,
"owl")). The row's delta holds no weights but says, under `sampling`, what its pictures are drawn with. So it is sampled, scored and
shown as any other row, and can't be exported or merged: there is no model without the concept, and a negative prompt is easily left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concept_ablation.common.needs import Need
from concept_ablation.methods.base import Method


class NegativePrompt(Method):
    """All pictures of a row are drawn with its targets as negative prompt, those of its anchor and its neighbors, too."""

    name = "negative-prompt"
    uses_anchors = False
    changes_weights = False
    row_fields = ("kind", "targets", "anchor")

    def needs(self, settings: Mapping) -> dict[Need, str]:
        return {"guidance": f"method {self.name}"}

    def mistake(self, settings: Mapping) -> str | None:
        scale = settings["evaluation"]["sampler"]["guidance_scale"]
        if scale > 1:
            return None
        return f"method negative-prompt does nothing without guidance: evaluation.sampler.guidance_scale is {scale} (allowed: above 1)"

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
        more = {"sampling": {"negative_prompt": ", ".join(spec["targets"])}}
        self.save(spec, {}, delta, training, more=more)


METHOD = NegativePrompt()
