"""Metric `clip_score_2_5`: the published CLIPScore, 2.5 max(cosine, 0)."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.evaluation.metrics.base import FeatureMetric, Values
from concept_ablation.evaluation.metrics.clip_cosine import METRIC as CLIP_COSINE
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import clip_score


class ClipScore(FeatureMetric):
    """`clip_cosine` at another scale, 0 to 2.5."""

    name = "clip_score_2_5"
    unit = "2.5 max(cosine, 0)"
    help = "The published CLIPScore: 2.5 x the cosine of an image and its own text, cut at 0. Compare it with no cosine."
    good_target, good_kept = "low", "unchanged"
    summary: ClassVar = {role: f"{role}_clip_score_2_5" for role in ("target", "anchor", "neighbor")}
    summary_form = "models"

    def values(self, probe: Probe, row: Row) -> Values:
        cosines = CLIP_COSINE.values(probe, row)
        return Values(clip_score(cosines.base), clip_score(cosines.ablated), cosines.text)


METRIC = ClipScore()
