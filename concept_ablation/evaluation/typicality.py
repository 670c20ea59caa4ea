"""Typical: the share of images that could be the base model's, by their nearest neighbor in the scorer's features.

Pure functions of features. docs/report.md defines the metric and gives what was measured about it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from concept_ablation.evaluation.statistics import (
    TIE,
    Estimate,
    cosine,
    paired_proportion_difference,
    percentiles,
    resample,
)

OUTLIERS = 0.1
"""The share of the reference's own images that count as not typical of it, at most."""


class NearestNeighbors(NamedTuple):
    """What `typical` compares, an image a number: its largest cosine with a reference image of another seed.

    base, ablated: (n,) of a probe's images by either model; reference: (m,) of the reference's own images, among
    themselves. same_seeds: the reference is the probe's own base images, so m = n and row i has one seed in all three.
    """

    base: np.ndarray
    ablated: np.ndarray
    reference: np.ndarray
    same_seeds: bool

    @classmethod
    def of(
        cls, base: np.ndarray, ablated: np.ndarray, reference: np.ndarray | None = None
    ) -> "NearestNeighbors":
        """Of image features (n, d) and the reference's (m, d), rows of length 1; None: `base` is the reference.

        Row i of all has the same seed, so it is left out of its own neighbors. Raises ValueError for m < 2.
        """
        same_seeds = reference is None
        reference = base if same_seeds else reference
        return cls(
            *(nearest_neighbor_similarity(side, reference) for side in (base, ablated, reference)), same_seeds
        )

    def typical(self, outliers: float = OUTLIERS) -> tuple[np.ndarray, np.ndarray]:
        """For the base and the ablated model, (n,): 1 where an image could be one of the reference's, else 0.

        The limit is the least value that at least nine in ten of the reference's own images have (1 - `outliers`). No text and
        no other subject enters. With k = m `outliers`, rounded down, (m - k) / m of the reference's own images are typical, and
        of images of the same model from new seeds (m - k) / (m + 1). This is a nearest-neighbor test of novelty, calibrated
        by leaving one out; like "precision" (Kynkäänniemi et al. 2019) it sees pictures that fit in nowhere, but not lost
        variety.
        """
        limit = np.sort(self.reference)[_lowest(len(self.reference), outliers)]
        return tuple((side >= limit - TIE).astype(np.float64) for side in (self.base, self.ablated))


def typical_change(
    probes: Sequence[NearestNeighbors],
    *,
    joint: bool = False,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Change of the share of typical images, ablated less base, of one probe or of several pooled image by image.

    The limit is estimated from the same images that it judges: a bootstrap draws the seeds again and takes the limit anew in
    each draw. Where hardly an image changes, its interval has no width, so the wider end on each side of it and of Bonett
    and Price's is taken. docs/report.md gives the coverage of both.

    Probes may share a reference, as several targets share the anchor's images. It is drawn once a draw for all of them, since its
    limit, where it errs, errs for all of them alike.

    `joint`: the probes have the same seeds in the same order, so a seed is drawn for all of them together.
    """
    level = {"confidence": confidence}
    sides = [np.concatenate(side) for side in zip(*(probe.typical() for probe in probes), strict=True)]
    fixed = paired_proportion_difference(sides[1], sides[0], **level)
    seeds = [seed if joint else seed + 2 * index for index in range(len(probes))]
    first = [next(i for i, other in enumerate(probes) if _share_reference(other, one)) for one in probes]
    redrawn = [
        _typical_change_redrawn(probe, draws, own, seeds[shared] + 1)
        for probe, own, shared in zip(probes, seeds, first, strict=True)
    ]
    low, high = percentiles(np.sum(redrawn, axis=0) / fixed.n, confidence)
    return Estimate(fixed.value, min(low, fixed.low), max(high, fixed.high), fixed.n, "redrawn-limit")


def nearest_neighbor_similarity(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(n,): each image's largest cosine with a reference image of another row."""
    if len(reference) < 2:
        raise ValueError(f"typical images need at least 2 reference images, got {len(reference)}")
    similarity = cosine(images, np.asarray(reference).T)
    np.fill_diagonal(similarity, -np.inf)
    return similarity.max(axis=1)


def _lowest(count: int, outliers: float) -> int:
    """How many of `count` images are no more than `outliers` of them; 0.1 of 30 is 3, whatever floats make of it."""
    return int(outliers * count + 1e-9)


def _share_reference(one: NearestNeighbors, other: NearestNeighbors) -> bool:
    """Whether two probes are compared with the same images, which neither of them owns; a probe always is with itself."""
    if one.same_seeds or other.same_seeds:
        return one is other
    return np.array_equal(one.reference, other.reference)


def _typical_change_redrawn(
    probe: NearestNeighbors, draws: int, seed: int, reference_seed: int
) -> np.ndarray:
    """(draws,): in how many images more the ablated model is typical, seeds drawn again and the limit taken anew."""
    counts = resample(np.zeros(len(probe.base)), draws, seed)
    others = counts if probe.same_seeds else resample(np.zeros(len(probe.reference)), draws, reference_seed)
    order = np.argsort(probe.reference)
    passed = np.cumsum(others[:, order], axis=1)  # of a draw's reference images, how many lie up to here
    rank = (passed > _lowest(len(order), OUTLIERS)).argmax(axis=1)
    limits = probe.reference[order][rank][:, None] - TIE
    gained = (probe.ablated >= limits).astype(np.float64) - (probe.base >= limits)
    return np.sum(counts * gained, axis=1)
