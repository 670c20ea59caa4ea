"""`how: joint`: one training on the pictures of all rows."""

from __future__ import annotations

from concept_ablation.methods.bundles.trained import Trained


class Joint(Trained):
    """Each batch is drawn from the pictures of all rows, each as likely as any other."""

    name = "joint"

    def parts(self, rows):
        return [list(rows)]


WAY = Joint()
