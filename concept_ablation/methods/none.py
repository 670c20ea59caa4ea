"""Method `none`: nothing is removed. The row's pictures are the unchanged model's, so what the report finds in them is its own noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concept_ablation.methods.base import Method


class Nothing(Method):
    """Its delta holds keys and values of the text as they are, so that it merges, exports and loads like any other."""

    name = "none"
    uses_anchors = False

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

        pipeline = load_model(spec["model"], device)
        family = family_of(pipeline)
        layers = family.text_projections(family.network(pipeline))
        own = {
            f"{family.network_name}.{name}.weight": layer.weight.detach() for name, layer in layers.items()
        }
        self.save(spec, own, delta, training)


METHOD = Nothing()
