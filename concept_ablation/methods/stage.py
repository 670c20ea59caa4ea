"""Stage `ablate_concept`: one row's delta, by the method that its spec names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concept_ablation.methods.records import describe
from concept_ablation.methods.strength import Search, write_looks
from concept_ablation.prompts.stage import read_prompts
from concept_ablation.registries import method_of


def ablate_concept(
    spec: Mapping,
    delta: str | Path,
    training: str | Path,
    strength: str | Path,
    *,
    anchors: str | Path | None = None,
    shared: str | Path | None = None,
    device: str = "auto",
    checkpoint_steps: int = 0,
) -> None:
    """Write the delta, the table of its steps and that of the looks at its strength, each whole or not at all.

    anchors: the image store of the anchor's pictures, for a method that reads them. shared: the file of the
    prompts that are preserved, where the rows of a bundle share them. `checkpoint_steps`: steps between checkpoints, 0: none. Raises UserError.
    """
    if "shared" in spec:
        spec = {**spec, "shared": read_prompts(shared)["prompts"]}
    strength = Path(strength)
    strength.unlink(missing_ok=True)  # of a run that was stopped before its delta was written
    if "search" not in spec:
        write_looks(strength, Search(), describe(spec))
    method_of(spec).run(spec, anchors, delta, training, device=device, checkpoint_steps=checkpoint_steps)
