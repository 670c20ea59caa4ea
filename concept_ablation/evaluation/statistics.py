"""The evaluation's mathematics: pure functions of features. No files, no models, no global state.

Feature rows have length 1, so a dot product is a cosine. Every `Estimate` carries its 95 % interval (or another
level) and says how the interval was made:

- `bootstrap`: percentiles of means over images drawn again with replacement; of continuous quantities.
- `wilson`: Wilson's score interval; of shares. A bootstrap of "32 of 32" would have no width at all, as if
  32 images could prove a share of exactly one; Wilson's interval there is [0.89, 1].
- `clopper-pearson`: exact, of shares of a sample that was looked at several times.
- `bonett-price`: the same repair for the difference of two shares on the same seeds.
- `newcombe`: the difference of two shares of different images, each with its Wilson interval.
- `redrawn-limit`: the change of `typical`, whose limit is itself estimated: see `typicality`.

An interval speaks about other seeds under the *same prompts*. The prompts are few (about ten) and chosen, so they
are taken as fixed; drawing prompts again would promise something about prompts nobody wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from concept_ablation.common.exact import clopper_pearson

TIE = 1e-6
"""Cosines closer than this are a tie: the same text, encoded twice, may differ by a rounding error."""


class Estimate(NamedTuple):
    """A value, its interval, the number of images behind it, and how the interval was made."""

    value: float
    low: float
    high: float
    n: int
    interval: str


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their level, the number of draws, and the seed of the draws.

    joint: pooled groups have the same seeds in the same order, so a seed is drawn for all of them together.
    looks: at how many sizes of a sample that grows the intervals hold all at once, with probability `confidence`.
    """

    confidence: float = 0.95
    draws: int = 1000
    seed: int = 0
    joint: bool = False
    looks: int = 1

    @property
    def level(self) -> float:
        """The level of a single interval: the error is spent on all looks in equal parts (Bonferroni's inequality)."""
        return 1 - (1 - self.confidence) / self.looks

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mean` and its like: as many draws lie beyond an interval's ends whatever its level."""
        draws = self.draws * self.looks
        return {"confidence": self.level, "draws": draws, "seed": self.seed, "joint": self.joint}


def cosine(images: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Cosine of each image with a text. images (n, d), text (d,), rows of length 1 -> (n,) in [-1, 1]."""
    return np.asarray(images, dtype=np.float64) @ np.asarray(text, dtype=np.float64)


def clip_score(cosines: np.ndarray) -> np.ndarray:
    """2.5 max(cos, 0), in [0, 2.5]: CLIPScore of Hessel et al. 2021, equation 1."""
    return 2.5 * np.maximum(cosines, 0)


def recognised(images: np.ndarray, texts: np.ndarray, own: int | Sequence[int]) -> np.ndarray:
    """1 where the text nearest to an image, of all texts, is number `own` (or one of several), 0 where it is another.

    When texts share the first place, the image counts as much as their share of `own`: two equal texts give one half
    each, so that comparing a text with itself says "undecided", not "never".

    Args:
        images: (n, d), rows of length 1.
        texts: (k, d), rows of length 1; with k = 2 this is the paper's CLIP accuracy, image by image.
        own: index, or indices, into `texts`.

    Returns:
        (n,) in [0, 1].
    """
    similarity = cosine(images, np.asarray(texts).T)
    first = similarity >= similarity.max(axis=1, keepdims=True) - TIE
    return first[:, np.atleast_1d(own)].sum(axis=1) / first.sum(axis=1)


def mean(
    values: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    joint: bool = False,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean over images with a percentile bootstrap interval.

    Args:
        values: (n,) one number an image.
        groups: (n,) labels; images are drawn again within their group, whose size stays (pooled neighbors: they are
            fixed, their seeds are not). None: one group.
        joint: the groups have the same seeds in the same order, so a seed is drawn for all of them together.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = resample(_labels(values, groups), draws, seed, joint)
    low, high = percentiles(weights @ values / len(values), confidence)
    return Estimate(float(values.mean()), low, high, len(values), "bootstrap")


def proportion(values: np.ndarray, *, confidence: float = 0.95, exact: bool = False) -> Estimate:
    """Share of images with Wilson's score interval (Wilson 1927). values (n,) in [0, 1] -> within [0, 1].

    exact: with Clopper and Pearson's. Wilson's holds less often than it says at levels far above 0.95.
    """
    n, share, z = len(values), float(np.mean(values)), _z(confidence)
    if exact:
        low, high = clopper_pearson(float(np.sum(values)), n, confidence)
        return Estimate(share, low, high, n, "clopper-pearson")
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Estimate(share, max(float(centre - half), 0.0), min(float(centre + half), 1.0), n, "wilson")


def paired_difference(
    after: np.ndarray,
    before: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    joint: bool = False,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean of `after - before` over the same seeds, with a bootstrap interval that draws pairs; arguments as in `mean`."""
    difference = _paired(after, before)
    return mean(difference, groups=groups, joint=joint, confidence=confidence, draws=draws, seed=seed)


def paired_proportion_difference(
    after: np.ndarray, before: np.ndarray, *, confidence: float = 0.95
) -> Estimate:
    """Difference of two shares on the same seeds: Bonett and Price's adjusted Wald interval (2012).

    One image is added that only `after` recognises and one that only `before` does, so the interval keeps a width even
    when no image changed. The value itself is the plain difference. after, before (n,) in [0, 1] -> within [-1, 1].
    """
    difference = _paired(after, before)
    n = len(difference)
    centre = difference.sum() / (n + 2)
    spread = (np.square(difference).sum() + 2) / (n + 2) - centre**2
    half = _z(confidence) * np.sqrt(spread / (n + 2))
    low, high = max(float(centre - half), -1.0), min(float(centre + half), 1.0)
    return Estimate(float(difference.mean()), low, high, n, "bonett-price")


def paired_loss(after: np.ndarray, before: np.ndarray) -> float:
    """The chance of at least so many losses among the pairs that differ, if loss and gain were equally likely: in (0, 1].

    McNemar's test (1947), exact and one-sided: a sign test of the pairs, which counts no pair that is equal on both sides.
    after, before (n,), row i of both has the same seed; without a pair that differs the chance is 1.
    """
    difference = _paired(after, before)
    lost, differing = int(np.sum(difference < 0)), int(np.count_nonzero(difference))
    return sum(comb(differing, count) for count in range(lost, differing + 1)) / 2**differing


def share_difference(
    one: np.ndarray, other: np.ndarray, *, confidence: float = 0.95, exact: bool = False
) -> Estimate:
    """Difference of two shares of different images: Newcombe's hybrid score interval (1998, method 10).

    one (n,), other (m,) in [0, 1] -> `one` less `other`, within [-1, 1]; n is that of `one`. exact: as of `proportion`.
    """
    a, b = (proportion(side, confidence=confidence, exact=exact) for side in (one, other))
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    high = value + np.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, float(low), float(high), a.n, "newcombe")


def kid(images: np.ndarray, reference: np.ndarray) -> float:
    """Kernel Inception Distance between two sets made with the same seeds: unbiased squared MMD, kernel (x.y + 1)^3.

    For features of length sqrt(d) this kernel is the published (x.y / d + 1)^3. The estimator is equation 3 of Gretton
    et al. 2012, a U-statistic over pairs of *seeds* i != j of
    k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i),
    so an image is never compared with its own twin: a model compared with itself gives exactly 0, where the
    two-sample form gives less than 0. It can be negative by chance.

    Args:
        images, reference: (n, d), rows of length 1; row i of both has the same prompt and seed. n >= 2.
    """
    kernel = _pair_kernel(images, reference)
    return float(kernel.sum() / (len(kernel) * (len(kernel) - 1)))


def kid_estimate(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    joint: bool = False,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean of the KIDs of several (images, reference) pairs, weighted by size, with a bootstrap interval over seeds.

    A seed drawn twice is not compared with itself, else every redrawn set would look more concentrated than it is.
    `joint`: the pairs have the same seeds in the same order, so a seed is drawn for all of them together.
    """
    sizes = np.array([len(images) for images, _ in pairs])
    value = float(np.average([kid(images, reference) for images, reference in pairs], weights=sizes))
    redrawn = [
        _kid_redrawn(*pair, draws, seed if joint else seed + index) for index, pair in enumerate(pairs)
    ]
    low, high = percentiles(np.average(redrawn, axis=0, weights=sizes), confidence)
    return Estimate(value, low, high, int(sizes.sum()), "bootstrap")


def resample(labels: np.ndarray, draws: int, seed: int, joint: bool = False) -> np.ndarray:
    """How often each image is taken in each of `draws` bootstrap samples: (draws, n), each group's sum is its size.

    `joint`: member i of every group is taken equally often. Raises ValueError when the groups' sizes then differ.
    """
    generator = np.random.default_rng(seed)
    counts, drawn = np.zeros((draws, len(labels))), None
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if drawn is None or not joint:
            shares = np.full(len(members), 1 / len(members))
            drawn = generator.multinomial(len(members), shares, size=draws)
        if drawn.shape[1] != len(members):
            raise ValueError(f"groups of {drawn.shape[1]} and {len(members)} images share no seeds")
        counts[:, members] = drawn
    return counts


def percentiles(redrawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central interval that holds `confidence` of the redrawn values."""
    low, high = np.quantile(redrawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _pair_kernel(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    x, y = np.asarray(images, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"KID needs two sets of the same shape and at least 2 images, got {x.shape} and {y.shape}"
        )
    cross = (x @ y.T + 1) ** 3
    kernel = (x @ x.T + 1) ** 3 + (y @ y.T + 1) ** 3 - cross - cross.T
    np.fill_diagonal(kernel, 0)
    return kernel


def _kid_redrawn(images: np.ndarray, reference: np.ndarray, draws: int, seed: int) -> np.ndarray:
    kernel = _pair_kernel(images, reference)
    n = len(kernel)
    counts = resample(np.zeros(n), draws, seed)
    different = n**2 - np.square(counts).sum(axis=1)  # ordered pairs of draws that hold two different seeds
    return np.sum((counts @ kernel) * counts, axis=1) / np.maximum(different, 1)


def _paired(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if after.shape != before.shape:
        raise ValueError(
            f"a paired difference needs the same seeds on both sides, got {after.shape} and {before.shape}"
        )
    return after - before


def _labels(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    if not len(values):
        raise ValueError("no images: a mean of nothing is not a score")
    return np.zeros(len(values)) if groups is None else np.asarray(groups)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
