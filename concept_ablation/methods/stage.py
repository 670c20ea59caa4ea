"""Stage `ablate_concept`: one row's delta, by the method that its spec names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concept_ablation.registries import method_of


def ablate_concept(
    spec: Mapping,
    delta: str | Path,
    training: str | Path,
    *,
    anchors: str | Path | None = None,
    device: str = "auto",
    checkpoint_steps: int = 0,
) -> None:
    """Write the delta and the table of its steps, each whole or not at all.

    anchors: the image store of the anchor's pictures, for a method that reads them. `checkpoint_steps`: steps between
    checkpoints, 0: none. Raises UserError.
    """
    method_of(spec).run(spec, anchors, delta, training, device=device, checkpoint_steps=checkpoint_steps)
