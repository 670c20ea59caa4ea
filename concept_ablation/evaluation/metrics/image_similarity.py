"""Metric `image_similarity`: how much the ablated model's image resembles the base model's of the same seed."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from concept_ablation.evaluation.metrics.base import FeatureMetric, Values
from concept_ablation.evaluation.row import Probe, Row


class ImageSimilarity(FeatureMetric):
    """The cosine of the scorer's features of the two images, -1 to 1; it compares both models, so it has one value."""

    name = "image_similarity"
    unit = "cosine"
    help = "Likeness: the mean cosine of the base and the ablated model's image of a seed; 1 is unchanged."
    good_kept = "near 1"
    summary: ClassVar = {role: f"{role}_image_similarity" for role in ("target", "anchor", "neighbor")}
    summary_form = "value"

    def values(self, probe: Probe, row: Row) -> Values:
        twins = np.sum(np.asarray(probe.base, dtype=np.float64) * probe.ablated, axis=1)
        return Values(None, twins, against="base model, same seed")


METRIC = ImageSimilarity()
