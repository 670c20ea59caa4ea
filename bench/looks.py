"""How often intervals hold the true value where pictures are added until they are enough, and how many pictures that takes, simulated.

    python bench/looks.py [--repeats 20000]

About a minute on one core. docs/report.md keeps the tables. Pictures come in looks of 16, at most 160. Drawing ends when the interval
lies wholly on one side of its limit or is at most 5 points wide to each side, as `evaluation.until: {half_width: 0.05, decided: true}`
does. *naive*: the interval of a single look, 95 %, at every look. *spent*: the level that `Bootstrap.level` gives it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from concept_ablation.common.decision import Decision
from concept_ablation.evaluation.statistics import (
    Bootstrap,
    Estimate,
    paired_proportion_difference,
    proportion,
)
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change

LOOK, MOST, HALF_WIDTH = 16, 160, 0.05
SIZES = range(LOOK, MOST + 1, LOOK)
PLANS = {"naive": 1, "spent": len(SIZES)}  # how many looks the level allows for
SIDES = {"share": "at most", "change": "at least"}
LIMITS = {"share": 0.2, "change": -0.05}


def follow(intervals: np.ndarray, values: np.ndarray, truth: float, what: str) -> tuple[float, float, float]:
    """Coverage at the end, coverage at all looks at once, mean number of pictures; intervals (repeats, looks, 2), values (repeats, looks)."""
    low, high = intervals[..., 0], intervals[..., 1]
    held = (low <= truth + 1e-9) & (truth <= high + 1e-9)
    enough = np.empty(values.shape, dtype=bool)
    for place in np.ndindex(values.shape):
        part = Decision.of(values[place], low[place], high[place], LIMITS[what], SIDES[what])
        enough[place] = part.settled or part.half_width <= HALF_WIDTH
    end = np.where(enough.any(axis=1), enough.argmax(axis=1), values.shape[1] - 1)
    return held[np.arange(len(end)), end].mean(), held.all(axis=1).mean(), np.asarray(SIZES)[end].mean()


def table(title: str, cases: dict[str, tuple[float, dict[str, tuple]]], what: str) -> None:
    print(
        f"\n| {title} | naive: at the end | at all looks | pictures | spent: at the end | at all looks | pictures |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, (truth, plans) in cases.items():
        cells = []
        for plan in PLANS:
            end, every, pictures = follow(*plans[plan], truth, what)
            cells += [f"{end:.3f}", f"{every:.3f}", f"{pictures:.0f}"]
        print(f"| {label} | {' | '.join(cells)} |".replace(" 0.", " ."), flush=True)


def looked_up(counts: np.ndarray, make: Callable[[int, tuple], Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Intervals and values of counts (repeats, looks, k); each that differs is computed once by `make(n, counts)`."""
    intervals, values = np.empty((*counts.shape[:2], 2)), np.empty(counts.shape[:2])
    for look, n in enumerate(SIZES):
        found, place = np.unique(counts[:, look], axis=0, return_inverse=True)
        made = [make(n, tuple(one)) for one in found.tolist()]
        intervals[:, look] = np.array([(one.low, one.high) for one in made])[place.ravel()]
        values[:, look] = np.array([one.value for one in made])[place.ravel()]
    return intervals, values


def shares(repeats: int) -> None:
    cases = {}
    for truth in (0.02, 0.1, 0.2, 0.5, 0.9):
        drawn = np.random.default_rng(0).random((repeats, MOST)) < truth
        counts = drawn.cumsum(axis=1)[:, LOOK - 1 :: LOOK, None]
        plans = {}
        for name, looks in PLANS.items():
            level = Bootstrap(looks=looks).level
            plans[name] = looked_up(
                counts,
                lambda n, k, level=level, looks=looks: proportion(
                    np.repeat([1.0, 0.0], [k[0], n - k[0]]), confidence=level, exact=looks > 1
                ),
            )
        cases[f"{truth:.2f}"] = truth, plans
    table("true share, limit .20", cases, "share")


def changes(repeats: int) -> None:
    cases = {}
    for gained, lost in ((0, 0), (0.02, 0.02), (0, 0.05), (0.05, 0.1), (0.2, 0.3)):
        drawn = np.random.default_rng(0).random((repeats, MOST))
        counts = np.stack([drawn < gained, drawn > 1 - lost], axis=-1).cumsum(axis=1)[:, LOOK - 1 :: LOOK]
        plans = {}
        for name, looks in PLANS.items():
            level = Bootstrap(looks=looks).level

            def make(n: int, k: tuple, level: float = level) -> Estimate:
                more, fewer = k
                difference = np.repeat([1.0, -1.0, 0.0], [more, fewer, n - more - fewer])
                return paired_proportion_difference(difference, np.zeros(n), confidence=level)

            plans[name] = looked_up(counts, make)
        cases[f"gained {gained:.2f}, lost {lost:.2f}"] = gained - lost, plans
    table("true change of a share, limit -.05", cases, "change")


def typical(repeats: int) -> None:
    """The change of typical images: features as in bench/coverage.py. Its true value is the mean of what 160 pictures give."""
    from coverage import World

    cases = {}
    for label, draw, size in (
        ("a third of the images changed", World.some_change, 0.33),
        ("one tight cluster, all shifted", World.all_shift, 0.3),
    ):
        world, found = World(), {name: [] for name in PLANS}
        for repeat in range(repeats):
            base, ablated = draw(world, MOST, size)
            for name, looks in PLANS.items():
                options = Bootstrap(draws=200, seed=repeat, looks=looks).options
                found[name].append(
                    [typical_change([NearestNeighbors.of(base[:n], ablated[:n])], **options) for n in SIZES]
                )
        truth = float(np.mean([one[-1].value for one in found["naive"]]))
        plans = {
            name: (
                np.array([[(look.low, look.high) for look in one] for one in made]),
                np.array([[look.value for look in one] for one in made]),
            )
            for name, made in found.items()
        }
        cases[f"{label}: {100 * truth:+.0f} points"] = truth, plans
    table("true change of `typical`, limit -.05", cases, "change")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20_000)
    repeats = parser.parse_args().repeats
    shares(repeats)
    changes(repeats)
    typical(max(20, repeats // 100))
