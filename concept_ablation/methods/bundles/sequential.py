"""`how: sequential`: row after row, each from where the one before left the model."""

from __future__ import annotations

from concept_ablation.methods.bundles.trained import Trained


class Sequential(Trained):
    """A row preserves what all rows preserve, and what its predecessors made of their targets' prompts."""

    name = "sequential"

    def parts(self, rows):
        return [[row] for row in rows]


WAY = Sequential()
