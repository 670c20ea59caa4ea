"""Stage `ablate_concept`: one row's delta, by the method that its spec names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.methods.ablation.preservation import read_rows
from concept_ablation.methods.records import describe
from concept_ablation.methods.strength import Search, write_looks
from concept_ablation.registries import method_of


def ablate_concept(
    spec: Mapping,
    delta: str | Path,
    training: str | Path,
    strength: str | Path,
    *,
    anchors: str | Path | None = None,
    shared: Sequence[str | Path] = (),
    device: str = "auto",
    checkpoint_steps: int = 0,
) -> None:
    """Write the delta, the table of its steps and that of the looks at its strength, each whole or not at all.

    anchors: the image store of the anchor's pictures, for a method that reads them. shared: the files of prompts that the spec's
    `shared_prompts` names, where other rows' prompts are preserved, too. `checkpoint_steps`: steps between
    checkpoints, 0: none. Raises UserError.
    """
    if "shared" in spec:
        spec = {**spec, "shared": read_rows(spec["shared"], spec["shared_prompts"], shared)}
    strength = Path(strength)
    strength.unlink(missing_ok=True)  # of a run that was stopped before its delta was written
    if "search" not in spec:
        write_looks(strength, Search(), describe(spec))
    method_of(spec).run(spec, anchors, delta, training, device=device, checkpoint_steps=checkpoint_steps)
