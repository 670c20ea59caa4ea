"""Metric `typical`: whether an image could be the base model's own. `evaluation.typicality` has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from concept_ablation.evaluation.metrics.base import SHARE, FeatureMetric, Values
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap, Estimate
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change


class Typical(FeatureMetric):
    """A target is compared with the anchor's images, which it should become; every other subject with its own."""

    name = "typical"
    unit = SHARE
    help = (
        "The share of images that could be the base model's: their nearest base image of another seed is no further away "
        "than for nine in ten of the base model's own. A target is held against the anchor's images."
    )
    interval = "share"
    good_target, good_kept = "near the anchor's own", "near 0.9"
    summary: ClassVar = {
        "target": "target_typical",
        "anchor": "anchor_typical",
        "neighbor": "neighbor_typical",
        "worst_neighbor": "worst_neighbor_typical",
    }

    def values(self, probe: Probe, row: Row) -> Values:
        anchor = row.anchor_probe
        like = anchor if probe.role in ("target", "paraphrase") and anchor else probe
        nearest = NearestNeighbors.of(probe.base, probe.ablated, None if like is probe else like.base)
        return Values(*nearest.typical(), like.subject, "base model, other seeds", nearest)

    def estimates(self, members: Sequence[Values], bootstrap: Bootstrap) -> dict[str, Estimate]:
        """As for any share, but the interval of the change allows for a limit that is estimated from the same images."""
        change = typical_change([member.detail for member in members], **bootstrap.options)
        return super().estimates(members, bootstrap) | {"difference": change}


METRIC = Typical()
