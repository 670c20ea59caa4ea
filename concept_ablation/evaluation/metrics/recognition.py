"""Metric `recognition`: whether an image's own text is the nearest of the row's subjects'."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.evaluation.metrics.base import SHARE, FeatureMetric, Values
from concept_ablation.evaluation.metrics.nearest_text import nearest_text
from concept_ablation.evaluation.row import Probe, Row


class Recognition(FeatureMetric):
    """The anchor's text is left out: it is a wider word ("cat") that is true of the target and of most neighbors, too."""

    name = "recognition"
    unit = SHARE
    help = "The share of images whose own text is the nearest among the targets' and all neighbors'. The anchor is left out."
    interval = "share"
    roles = ("target", "paraphrase", "neighbor")
    good_kept = "high"
    label = "recognised"
    summary: ClassVar = {"neighbor": "neighbor_recognition"}

    def values(self, probe: Probe, row: Row) -> Values:
        return nearest_text(probe, row, row.shown_by(probe), (*row.targets, *row.neighbors))


METRIC = Recognition()
