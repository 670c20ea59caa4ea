"""Metric `clip_accuracy`: whether an image is nearer to its own text than to the anchor's."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.evaluation.metrics.base import SHARE, FeatureMetric, Values
from concept_ablation.evaluation.metrics.nearest_text import nearest_text
from concept_ablation.evaluation.row import Probe, Row


class ClipAccuracy(FeatureMetric):
    """The anchor's own images are compared with the targets' texts: comparing the anchor with itself would say nothing."""

    name = "clip_accuracy"
    unit = SHARE
    help = (
        "The share of images that are nearer to their own text than to the anchor's. Of the anchor's images, and of "
        "paraphrases: nearer to a target's text."
    )
    interval = "share"
    good_target, good_kept = "low", "neighbors high"
    label = "seen by CLIP"
    shows_target = "nearer to the target's text than to the anchor's"
    title = "Target still seen"
    probe_label = "seen as {target}"
    summary: ClassVar = {
        "target": "target_accuracy",
        "anchor": "anchor_accuracy",
        "neighbor": "neighbor_accuracy",
    }

    def values(self, probe: Probe, row: Row) -> Values:
        own = row.shown_by(probe)
        return nearest_text(probe, row, own, (*own, row.anchor))


METRIC = ClipAccuracy()
