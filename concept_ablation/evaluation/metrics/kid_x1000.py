"""Metric `kid_x1000`: the distance between the two models' images of the same prompts, as sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from concept_ablation.evaluation.metrics.base import FeatureMetric, Values
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap, Estimate, kid_estimate

SAME_PROMPTS = "base model, same prompts"


class Kid(FeatureMetric):
    """KID compares sets of images and has no value for a single one, so `Values` holds the features themselves."""

    name = "kid_x1000"
    unit = "1e-3"
    help = (
        "1000 x the Kernel Inception Distance between the base and the ablated model's images of the same prompts, in the "
        "scorer's features: 0 when they follow one distribution, and by chance below 0."
    )
    interval = "own"
    per_image = False
    good_target, good_kept = "high", "near 0"
    summary: ClassVar = {role: f"{role}_kid_x1000" for role in ("target", "anchor", "neighbor")}
    summary_form = "interval"
    pooled_against = SAME_PROMPTS

    def values(self, probe: Probe, row: Row) -> Values:
        return Values(probe.base, probe.ablated, against=SAME_PROMPTS)

    def estimates(self, members: Sequence[Values], bootstrap: Bootstrap) -> dict[str, Estimate]:
        """The KID of several probes is the mean of theirs, weighted by images, never the KID of their mixture."""
        kid = kid_estimate([(member.ablated, member.base) for member in members], **bootstrap.options)
        return {"ablated": Estimate(1000 * kid.value, 1000 * kid.low, 1000 * kid.high, kid.n, kid.interval)}

    def decimals(self, value: float) -> int:
        return 0 if abs(value) >= 100 else 1


METRIC = Kid()
