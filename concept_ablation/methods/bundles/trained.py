"""What the ways share that train on the rows' anchor pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from concept_ablation.methods.bundles.base import Way


class Trained(Way):
    """A way whose model is trained, in one or several parts one after the other. The bundle's `training` holds its settings."""

    stage = "train_bundle"
    reads: ClassVar = ("prompts", "anchors")

    def needs(self, settings):
        preserve = settings["training"].get("preserve", "none")
        if preserve not in ("null-space", "both"):
            return {}
        return {"text-projections": f"how {self.name} with bundles.training.preserve {preserve}"}

    def parts(self, rows: Sequence[Mapping]) -> list[list[Mapping]]:
        """The rows of each part, in the order in which they are trained."""
        raise NotImplementedError
