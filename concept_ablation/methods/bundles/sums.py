"""`how: sum`: all changes added up (task arithmetic, Ilharco et al., 2023)."""

from __future__ import annotations

from concept_ablation.methods.bundles.base import Way


class Sum(Way):
    """Of any parameters; it reads no prompt."""

    name = "sum"

    def merge(self, spec, deltas, rows, pipeline):
        from concept_ablation.methods.merging import add_up

        return add_up(deltas.changes()), {}


WAY = Sum()
