"""Metric `clip_cosine`: how near an image is to the text that its prompt names."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.evaluation.metrics.base import FeatureMetric, Values
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import cosine


class ClipCosine(FeatureMetric):
    """The same measurement as `clip_score_2_5`, at its own scale, -1 to 1."""

    name = "clip_cosine"
    unit = "cosine"
    help = "The mean cosine of an image and its own text."
    good_target, good_kept = "low", "unchanged"
    summary: ClassVar = {role: f"{role}_clip_cosine" for role in ("target", "anchor", "neighbor")}
    summary_form = "models"

    def values(self, probe: Probe, row: Row) -> Values:
        word = row.named_by(probe)
        return Values(*(cosine(side, row.texts[word]) for side in (probe.base, probe.ablated)), word)


METRIC = ClipCosine()
