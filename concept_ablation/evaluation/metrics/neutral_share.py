"""Metric `neutral_share`: how often images that were asked for no target pass for it."""

from __future__ import annotations

from concept_ablation.evaluation.metrics.base import SHARE, RowMetric, Values
from concept_ablation.evaluation.metrics.nearest_text import nearest_text
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.kinds.base import Kind


class NeutralShare(RowMetric):
    """The anchor's images are counted. No ablation can make a style rarer than it is in them, so its limit lies above this share."""

    name = "neutral_share"
    unit = SHARE
    help = "The share of the anchor's images that are nearer to the target's text than to the anchor's: nothing asked for it."
    interval = "share"
    roles = ("target",)

    def applies(self, kind: Kind) -> bool:
        return kind.limit_above_neutral

    def values(self, probe: Probe, row: Row) -> Values | None:
        anchor = row.anchor_probe
        return anchor and nearest_text(anchor, row, (probe.subject,), (probe.subject, row.anchor))


METRIC = NeutralShare()
