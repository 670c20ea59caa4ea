"""Metric `content`: whether an image shows the anchor, as far as texts tell it from the neighbors."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.evaluation.metrics.base import SHARE, FeatureMetric, Values
from concept_ablation.evaluation.metrics.nearest_text import nearest_text
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.kinds.base import Kind


class Content(FeatureMetric):
    """Styles have no `content`: their anchor ("picture") is true of every image, so texts can't tell it from the neighbors."""

    name = "content"
    unit = SHARE
    help = "The share of images whose nearest text, of the anchor's and the neighbors', is the anchor's."
    interval = "share"
    roles = ("target", "paraphrase", "anchor")
    good_target = "near the anchor's own"
    summary: ClassVar = {"target": "target_content", "anchor": "anchor_content"}

    def applies(self, kind: Kind) -> bool:
        return not kind.limit_above_neutral

    def values(self, probe: Probe, row: Row) -> Values | None:
        if not row.neighbors:
            return None  # nothing to choose from
        return nearest_text(probe, row, (row.anchor,), (row.anchor, *row.neighbors))


METRIC = Content()
