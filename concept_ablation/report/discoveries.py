"""False discoveries over the rows: how sure the claims "removed" and "harmed" are, and what of them stands when all rows are claims.

A p-value here is the verdict's own interval turned round: it is at most 0.05 exactly where the 95 % interval lies wholly beyond the
limit. Pictures that were looked at several times have intervals that share the error among the looks, so the p-value is multiplied by
their number. docs/report.md states the hypotheses. Benjamini and Hochberg's adjustment, for all tables of the report, is here.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, hypot, sqrt
from statistics import NormalDist
from typing import NamedTuple

from concept_ablation.common.exact import at_most
from concept_ablation.registries import KINDS
from concept_ablation.verdict import LOSSES, NOT_SHOWN, Thresholds, changes_of, target_limit

LEVEL = 0.05
"""The share of false ones among all that are claimed, at most, in the mean: see `adjust`."""

CLAIMS = ("removed", "harmed")
"""What is claimed of a row; each has columns `_p`, `_p_adjusted` and `_controlled` in the summary."""

FARTHEST = 40.0
"""Standard deviations beyond which no interval is sought; the p-value is 0 in a float long before."""


class Share(NamedTuple):
    """A share of n images, which were looked at up to `looks` times."""

    value: float
    n: int
    looks: int = 1


def adjust(values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number: of those at most q, a share of at most q is false, in the mean.

    Benjamini and Hochberg 1995: the i-th smallest of m becomes the least of all p_j m / j with j >= i. It holds for independent
    tests and for those that depend positively on each other (Benjamini and Yekutieli 2001).
    """
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    found, least = [1.0] * len(values), 1.0
    for rank, place in zip(range(len(values), 0, -1), order, strict=True):
        least = found[place] = min(least, values[place] * len(values) / rank)
    return found


def claim_columns(rows: Sequence[Mapping[str, float | None]]) -> list[dict]:
    """The summary's columns of each row, from `claim_p` of each: every claim is adjusted over the rows of which it can be made."""
    columns: list[dict] = [{} for _ in rows]
    for claim in CLAIMS:
        asked = [place for place, row in enumerate(rows) if row[claim] is not None]
        adjusted = dict(zip(asked, adjust([rows[place][claim] for place in asked]), strict=True))
        for place, row in enumerate(rows):
            p = adjusted.get(place)
            columns[place] |= {f"{claim}_p": row[claim], f"{claim}_p_adjusted": p}
            columns[place][f"{claim}_controlled"] = None if p is None else p <= LEVEL
    return columns


def claim_p(
    row: Mapping, lines: Sequence[Mapping], verdict: str, thresholds: Thresholds, judges_anchor: bool = True
) -> dict[str, float | None]:
    """How likely a row's measurements are at most if a claim is wrong: p-values of `CLAIMS`, None for one that can't be made.

    removed: of each target the share isn't below its limit; of several targets the largest p, since all must be gone (an
    intersection-union test). harmed: nothing that was to be kept lost more than its limit; the smallest p times their number (Bonferroni).

    Args:
        row: kind, targets, neighbors, and confidence, the level of its intervals (0.95 if missing).
        lines: its long table.
        judges_anchor: whether the anchor is to be kept.
    """
    confidence = row.get("confidence", 0.95)
    removed = max(_target_p(row["kind"], target, lines, thresholds) for target in row["targets"])
    changes, tests = changes_of(lines), []
    for loss, change in LOSSES.items():
        if change in changes and (judges_anchor or loss != "anchor_loss"):
            several = max(len(row["neighbors"]), 1) if loss == "worst_neighbor_loss" else 1
            excess = -changes[change] - getattr(thresholds, f"{loss}_max")
            low = -changes[f"{change}_high"] - getattr(thresholds, f"{loss}_max")
            tests.append(loss_p(excess, low, confidence, several * looks_at(lines, change)))
    shown = verdict != NOT_SHOWN
    return {
        "removed": removed if shown else None,
        "harmed": min(1.0, len(tests) * min(tests)) if tests else None,
    }


def share_p(share: Share, limit: float) -> float:
    """Two-sided p of a share below `limit`, 1 for one that isn't: Wilson's score test, whose intervals are the shares' own.

    With several looks the exact test, as the shares then have Clopper and Pearson's intervals.
    """
    if share.looks > 1:
        return min(1.0, 2 * share.looks * at_most(ceil(share.value * share.n - 1e-9), share.n, limit))
    spread = sqrt(limit * (1 - limit) / share.n)
    return _two_sided((limit - share.value) / spread if spread else 0.0)


def share_above_p(share: Share, neutral: Share, margin: float) -> float:
    """The same of a share that lies less than `margin` above another one of other images: Newcombe's interval turned round."""

    def upper(z: float) -> float:
        a, b = wilson(share, z), wilson(neutral, z)
        return share.value - neutral.value + hypot(a[1] - share.value, neutral.value - b[0]) - margin

    return min(1.0, share.looks * _two_sided(_last_below(upper)))


def loss_p(excess: float, low: float, confidence: float, several: int = 1) -> float:
    """Two-sided p of a loss beyond its limit by `excess`, 1 for one that isn't beyond it.

    low: the lower end of the excess' interval. Its distance is taken to grow with the quantile, as that of Bonett and Price's does; so p is
    exact where it matters, at the interval's end. several: of how many the largest was chosen, times the looks; the interval has their Bonferroni level.
    """
    quantile = NormalDist().inv_cdf(1 - (1 - confidence) / (2 * several))
    width = max(excess - low, 1e-12)
    return min(1.0, several * _two_sided(quantile * excess / width))


def looks_at(lines: Sequence[Mapping], change: str) -> int:
    """The looks that the interval of a change of `verdict.LOSSES` is shared among, 1 where its pictures were drawn at once."""
    role = "anchor" if change.startswith("anchor") else "neighbor"
    return max([line.get("looks_most") or 1 for line in lines if line["role"] == role], default=1)


def wilson(share: Share, z: float) -> tuple[float, float]:
    """Wilson's interval of a share at z standard deviations."""
    value, n = share.value, share.n
    centre, half = value + z * z / (2 * n), z * sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def _target_p(kind: str, target: str, lines: Sequence[Mapping], thresholds: Thresholds) -> float:
    found = {
        (line["metric"], line["side"]): Share(line["value"], line["n"], line.get("looks_most") or 1)
        for line in lines
        if line["role"] == "target" and line["probe"] == target
    }
    after, neutral = found[KINDS[kind].measure, "ablated"], found.get(("neutral_share", "base"))
    if ("above_neutral", "ablated") in found and neutral:
        return share_above_p(after, neutral, getattr(thresholds, KINDS[kind].limit))
    return share_p(after, target_limit(kind, neutral and neutral.value, thresholds))


def _two_sided(z: float) -> float:
    """Twice the tail beyond z; 1 where z isn't above 0."""
    return min(1.0, 2 * NormalDist().cdf(-z))


def _last_below(upper: Callable[[float], float]) -> float:
    """The z at which an interval's upper end, which grows with z, reaches 0; 0 if it lies above from the start."""
    near, far = 0.0, FARTHEST
    if upper(near) >= 0 or upper(far) < 0:
        return near if upper(near) >= 0 else far
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if upper(middle) < 0 else (near, middle)
    return near
