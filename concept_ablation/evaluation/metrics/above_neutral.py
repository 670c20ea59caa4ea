"""Metric `above_neutral`: how much more often a target's images show it than images that were asked for none."""

from __future__ import annotations

from collections.abc import Sequence

from concept_ablation.evaluation.metrics.base import SHARE, RowMetric, Values
from concept_ablation.evaluation.metrics.clip_accuracy import METRIC as CLIP_ACCURACY
from concept_ablation.evaluation.metrics.neutral_share import METRIC as NEUTRAL_SHARE
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap, Estimate, share_difference
from concept_ablation.kinds.base import Kind


class AboveNeutral(RowMetric):
    """The target's `clip_accuracy` by the ablated model less its `neutral_share` by the base model: both are estimated."""

    name = "above_neutral"
    unit = SHARE
    help = "The target's clip_accuracy after the ablation, less its neutral_share on the base model."
    interval = "own"
    roles = ("target",)
    good_target = "at most style_margin"

    def applies(self, kind: Kind) -> bool:
        return kind.limit_above_neutral

    def values(self, probe: Probe, row: Row) -> Values | None:
        neutral = NEUTRAL_SHARE.values(probe, row)
        if neutral is None:
            return None
        after = CLIP_ACCURACY.values(probe, row).ablated
        return Values(neutral.base, after, neutral.text, neutral.against)

    def estimates(self, members: Sequence[Values], bootstrap: Bootstrap) -> dict[str, Estimate]:
        (shares,) = members
        level = {"confidence": bootstrap.level, "exact": bootstrap.looks > 1}
        above = share_difference(shares.ablated, shares.base, **level)
        return {"ablated": above}


METRIC = AboveNeutral()
