"""`how: ties`: what is largest in each change and agrees in sign (TIES, Yadav et al., 2023)."""

from __future__ import annotations

from concept_ablation.methods.bundles.base import Way


class Ties(Way):
    """Of any parameters; it reads no prompt. `density`: the share of each change's values that stays."""

    name = "ties"
    settings = ("density",)

    def merge(self, spec, deltas, rows, pipeline):
        from concept_ablation.methods.merging import ties

        return ties(deltas.changes, spec["density"]), {}


WAY = Ties()
