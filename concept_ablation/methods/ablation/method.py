"""Method `ablation`: Kumari et al., ICCV 2023. On the anchor's pictures, the target's prediction is moved to the anchor's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concept_ablation.methods.base import Method


class Ablation(Method):
    """Its settings are the config's `training`, since the recipes of `presets` are written in them."""

    name = "ablation"

    def work(self, settings: Mapping, templates: list[str]) -> dict:
        training = {**settings["training"], "style_templates": templates}
        training["group"], seed = training.pop("parameter_group"), training.pop("seed")
        return {"method": self.name, "training": training, "seed": seed}

    def templates(self, spec: Mapping) -> list[str]:
        return spec["training"]["style_templates"]

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
        from concept_ablation.methods.ablation.stage import ablate_concept

        # Beside the outputs, but no output: what Snakemake would remove when the job is killed.
        folder = Path(delta).parent
        checkpoint = folder.parents[1] / "checkpoints" / f"{folder.name}.pt"
        ablate_concept(
            spec,
            anchors,
            delta,
            training,
            device=device,
            checkpoint_path=checkpoint,
            checkpoint_steps=checkpoint_steps,
        )


METHOD = Ablation()
