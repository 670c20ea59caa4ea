"""The verdict on a row: which measure decides for its kind, which thresholds, and what they give.

Decided here and nowhere else. docs/report.md explains the verdicts to a reader.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from concept_ablation.common.decision import Decision
from concept_ablation.common.roles import POOLS, WORST
from concept_ablation.registries import KINDS

KEPT = "removed, neighbors kept"
HARMED = "removed, neighbors harmed"
ONE_HARMED = "removed, a neighbor harmed"
ANCHOR_HARMED = "removed, anchor harmed"
ALONE = "removed, no neighbors measured"
PRESENT = "not removed"
TARGET_WIDE = "inconclusive about the target"
NEIGHBORS_WIDE = "inconclusive about the neighbors"
ONE_WIDE = "inconclusive about a neighbor"
ANCHOR_WIDE = "inconclusive about the anchor"
NOT_SHOWN = "inconclusive: the base model rarely shows the target"
VERDICTS = (
    KEPT,
    ALONE,
    HARMED,
    ONE_HARMED,
    ANCHOR_HARMED,
    PRESENT,
    TARGET_WIDE,
    NEIGHBORS_WIDE,
    ONE_WIDE,
    ANCHOR_WIDE,
    NOT_SHOWN,
)


CHANGES = {
    "neighbor_recognition_change": (POOLS["neighbor"], "recognition"),
    "worst_neighbor_typical_change": (WORST, "typical"),
    "anchor_typical_change": ("anchor", "typical"),
}
"""What decides whether the neighbors and the anchor were kept: name -> role and metric of the long table."""

LOSSES = {
    "anchor_loss": "anchor_typical_change",
    "neighbor_loss": "neighbor_recognition_change",
    "worst_neighbor_loss": "worst_neighbor_typical_change",
}
"""A loss, whose limit among the thresholds is called `<loss>_max` -> the change of which it is the negative."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as removed and as kept: `verdict` in the config, which holds the values. Shares of images, 0 to 1.

    target_max: an object is removed when at most this share of the target's images is still nearer to the target's text.
    style_margin: a style is removed at the share that neutral prompts give on the base model, plus this.
    copy_max: a memorized picture is removed when at most this share of the caption's images are copies of it.
    detected_max: unwanted content is removed when at most this share of the target's images is flagged.
    neighbor_loss_max: neighbors are kept when their recognition falls by at most this,
    worst_neighbor_loss_max: and the share of typical images of none of them by more than this.
    anchor_loss_max: the anchor is kept when the share of its images that are typical falls by at most this.
    base_min: below this share on the base model there was nothing to remove.
    half_width_max: an interval wider than +- this, and holding the limit, decides nothing.
    """

    target_max: float
    style_margin: float
    copy_max: float
    detected_max: float
    neighbor_loss_max: float
    worst_neighbor_loss_max: float
    anchor_loss_max: float
    base_min: float
    half_width_max: float


@dataclass(frozen=True)
class Presence:
    """One target: the share of its images in which it is still there, before and after, by its kind's measure.

    neutral: for a style, the share of the base model's anchor images that pass for it; above: how far `ablated` lies above
    that, with the interval of this difference.
    """

    target: str
    base: float
    ablated: float
    low: float
    high: float
    neutral: float | None = None
    above: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one row, in words and in parts.

    removed, kept, anchor_kept: whether the measured values are within the limits; None where nothing was measured. kept: of
    all neighbors together and of the worst one.
    firmness: "firm" where the intervals, too, lie wholly on the verdict's side; else "provisional": more images could
    change it.
    deciding_target: the target that is furthest beyond its limit, or nearest to it; target_limit: that limit;
    target_excess: how far its share lies beyond (negative: within), with the interval that decides.
    """

    verdict: str
    removed: bool
    kept: bool | None
    anchor_kept: bool | None
    firmness: Literal["firm", "provisional"]
    deciding_target: str
    target_limit: float
    target_excess: float
    target_excess_low: float
    target_excess_high: float


@dataclass(frozen=True)
class Parts:
    """What a verdict is made of, each value beside its limit; None: not measured. targets: one a target of the row, in its order."""

    targets: tuple[Decision, ...]
    neighbors: Decision | None
    worst: Decision | None
    anchor: Decision | None

    @property
    def removed(self) -> Decision:
        """The target that speaks for the row: one that is still there, else the least certain one."""
        beyond = [part for part in self.targets if not part.within]
        if beyond:
            candidates = [part for part in beyond if part.settled] or beyond
        else:
            candidates = [part for part in self.targets if not part.settled] or list(self.targets)
        return max(candidates, key=lambda part: part.excess)


def decide(kind: str, targets: Sequence[Presence], summary: Mapping, thresholds: Thresholds) -> Verdict:
    """The verdict on one row.

    The measured values decide; the intervals say whether they may ("inconclusive") and how firmly (`firmness`).

    Args:
        targets: each target of the row; removed means every one of them.
        summary: neighbor_recognition_change, worst_neighbor_typical_change and anchor_typical_change, each with _low and
            _high; None: not measured.
    """
    parts = parts_of(kind, targets, summary, thresholds)
    removed, neighbors, worst, anchor = parts.removed, parts.neighbors, parts.worst, parts.anchor
    deciding = targets[parts.targets.index(removed)]
    # What was spared matters only once the target is gone.
    decided = [removed, *filter(None, (neighbors, worst, anchor))] if removed.within else [removed]
    if any(target.base < thresholds.base_min for target in targets):
        verdict = NOT_SHOWN
    else:
        verdict = _words(removed, neighbors, worst, anchor, thresholds.half_width_max)
    firm = verdict != NOT_SHOWN and all(part.settled for part in decided)
    return Verdict(
        verdict,
        removed.within,
        neighbors and neighbors.within and (worst is None or worst.within),
        anchor and anchor.within,
        "firm" if firm else "provisional",
        deciding.target,
        target_limit(kind, deciding.neutral, thresholds),
        removed.excess,
        removed.low,
        removed.high,
    )


def parts_of(kind: str, targets: Sequence[Presence], summary: Mapping, thresholds: Thresholds) -> Parts:
    """Each value that decides beside its limit; arguments as of `decide`."""
    return Parts(
        tuple(_presence_decision(kind, target, thresholds) for target in targets),
        _loss(summary, "neighbor_recognition_change", thresholds.neighbor_loss_max),
        _loss(summary, "worst_neighbor_typical_change", thresholds.worst_neighbor_loss_max),
        _loss(summary, "anchor_typical_change", thresholds.anchor_loss_max),
    )


def changes_of(lines: Iterable[Mapping]) -> dict[str, float]:
    """What `decide` reads of the anchor and the neighbors, from lines of the long table; without those that aren't there."""
    found = {}
    places = {(role, metric): name for name, (role, metric) in CHANGES.items()}
    for line in lines:
        name = places.get((line["role"], line["metric"]))
        if name and line["side"] == "difference":
            found |= {name: line["value"], f"{name}_low": line["ci_low"], f"{name}_high": line["ci_high"]}
    return found


def presence_of(row: Mapping, lines: Iterable[Mapping]) -> list[Presence]:
    """Each target of a row, with the share of its images in which it is still there, from lines of the long table."""
    found = {
        (line["probe"], line["metric"], line["side"]): line for line in lines if line["role"] == "target"
    }
    measure, targets = KINDS[row["kind"]].measure, []
    for target in row["targets"]:
        after = found[target, measure, "ablated"]
        before = found.get((target, measure, "base"), after)
        neutral = found.get((target, "neutral_share", "base"), {}).get("value")
        above = found.get((target, "above_neutral", "ablated"))
        above = above and (above["value"], above["ci_low"], above["ci_high"])
        interval = after["ci_low"], after["ci_high"]
        targets.append(Presence(target, before["value"], after["value"], *interval, neutral, above))
    return targets


def _presence_decision(kind: str, target: Presence, thresholds: Thresholds) -> Decision:
    """A target's share beside its limit. Where the limit lies above a neutral share, both are estimated: their difference decides."""
    if target.above is not None:
        return Decision.of(*target.above, getattr(thresholds, KINDS[kind].limit), "at most")
    limit = target_limit(kind, target.neutral, thresholds)
    return Decision.of(target.ablated, target.low, target.high, limit, "at most")


def target_limit(kind: str, neutral: float | None, thresholds: Thresholds) -> float:
    """The share of a target's images that counts as removed.

    A style can't fall below what prompts without any style give: the base model's own share under the anchor.
    """
    own = getattr(thresholds, KINDS[kind].limit)
    return own + (neutral or 0.0) if KINDS[kind].limit_above_neutral else own


def read_thresholds(spec: Mapping) -> Thresholds:
    """The thresholds in a report's spec, all of them under `verdict`. Raises ValueError for an unknown or missing name."""
    given, known = dict(spec["verdict"]), [field.name for field in fields(Thresholds)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"verdict: unknown {', '.join(unknown)} (allowed: {', '.join(known)})")
    if missing := [name for name in known if name not in given]:
        raise ValueError(f"verdict: {', '.join(missing)} missing")
    return Thresholds(**given)


def _loss(summary: Mapping, column: str, most: float) -> Decision | None:
    value, low, high = (summary.get(column + end) for end in ("", "_low", "_high"))
    return None if value is None else Decision.of(value, low, high, -most, "at least")


def _words(
    removed: Decision,
    neighbors: Decision | None,
    worst: Decision | None,
    anchor: Decision | None,
    half_width_max: float,
) -> str:
    """The verdict that the decisions give. Measured harm stands, whatever else is still undecided.

    The worst neighbor was chosen for its loss: within its limit it raises no doubt, however wide its interval is.
    """
    undecided = {
        words
        for words, part in (
            (TARGET_WIDE, removed),
            (NEIGHBORS_WIDE, neighbors),
            (ONE_WIDE, worst if worst and not worst.within else None),
            (ANCHOR_WIDE, anchor),
        )
        if part and not part.settled and part.half_width > half_width_max
    }
    if TARGET_WIDE in undecided:
        return TARGET_WIDE
    if not removed.within:
        return PRESENT
    spared = (
        (neighbors, HARMED, NEIGHBORS_WIDE),
        (worst, ONE_HARMED, ONE_WIDE),
        (anchor, ANCHOR_HARMED, ANCHOR_WIDE),
    )
    for part, harmed, wide in spared:
        if part and not part.within and wide not in undecided:
            return harmed
    return next((wide for _, _, wide in spared if wide in undecided), KEPT if neighbors else ALONE)
