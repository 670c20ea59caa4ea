"""How often intervals hold the true value where pictures are added until they are enough, and how many pictures that takes, simulated.

    python bench/looks.py [--repeats 20000]

About three minutes on one core. docs/report.md keeps the tables. Pictures come in looks of 16, at most 160. Drawing ends when the interval
lies wholly on one side of its limit or is at most 5 points wide to each side, as `evaluation.until: {half_width: 0.05, decided: true}`
does. *naive*: the interval of a single look, 95 %, at every look. *spent*: the level that `Bootstrap.level` gives it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from concept_ablation.common.decision import Decision
from concept_ablation.evaluation.looks import open_lanes
from concept_ablation.evaluation.statistics import (
    Bootstrap,
    Estimate,
    paired_proportion_difference,
    proportion,
)
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change
from concept_ablation.verdict import Parts

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


WHOLE = {"target": 200, "neighbor": 50}  # pictures of a probe by lane, config/sd14.yaml
ROWS = {  # share of the target's pictures; gained and lost ones of the anchor (typical) and of the neighbors (recognised)
    "removed, all else as it was": (0.02, (0.02, 0.05), (0.01, 0.01)),
    "removed, neighbors change a little": (0.05, (0.05, 0.15), (0.03, 0.04)),
    "removed, neighbors lose 15 points": (0.05, (0.05, 0.25), (0.02, 0.17)),
    "the target's share at its limit": (0.2, (0.05, 0.15), (0.01, 0.01)),
    "not removed": (0.8, (0.01, 0.01), (0.01, 0.01)),
}


def rows(repeats: int, neighbors: int = 5) -> None:
    """Pictures of a row of config/sd14.yaml, of 200 + 200 + 50 a neighbor, by the stage's own rule; `typical` with a limit as if fixed."""
    rng = np.random.default_rng(0)
    print(
        f"\n| a row with {neighbors} neighbors | pictures of the target | of the anchor | of a neighbor | together, of 650 | firm | firm with all 650, one look |"
        "\n|---|---|---|---|---|---|---|"
    )
    for label, (present, anchor, others) in ROWS.items():
        totals = []
        for _ in range(repeats):
            drawn = {
                "target": (rng.random(WHOLE["target"]) < present).astype(float),
                "anchor": one_change(rng, WHOLE["target"], *anchor),
                "neighbor": one_change(rng, WHOLE["neighbor"] * neighbors, *others),
            }
            taken, parts = draw_row(
                drawn, neighbors, {lane: -(-count // LOOK) for lane, count in WHOLE.items()}
            )
            whole = judge_row(drawn, WHOLE, neighbors, dict.fromkeys(WHOLE, 1))
            count = 2 * taken["target"] + neighbors * taken["neighbor"]
            totals.append(
                (taken["target"], taken["target"], taken["neighbor"], count, is_firm(parts), is_firm(whole))
            )
        *counts, firm, fixed = np.mean(totals, axis=0)
        cells = [f"{count:.0f}" for count in counts] + [f"{100 * share:.0f} %" for share in (firm, fixed)]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def draw_row(
    drawn: dict[str, np.ndarray], neighbors: int, planned: dict[str, int]
) -> tuple[dict[str, int], Parts]:
    """The pictures of each lane's probes that are needed, and what they say."""
    open_now, taken = set(WHOLE), dict.fromkeys(WHOLE, 0)
    while open_now:
        taken |= {lane: min(taken[lane] + LOOK, WHOLE[lane]) for lane in open_now}
        parts = judge_row(drawn, taken, neighbors, planned)
        open_now &= open_lanes(parts, HALF_WIDTH, True) & {
            lane for lane in WHOLE if taken[lane] < WHOLE[lane]
        }
    return taken, parts


def judge_row(
    drawn: dict[str, np.ndarray], taken: dict[str, int], neighbors: int, looks: dict[str, int]
) -> Parts:
    n = {"target": taken["target"], "anchor": taken["target"], "neighbor": taken["neighbor"] * neighbors}
    level = {lane: Bootstrap(looks=count).level for lane, count in looks.items()}
    share = proportion(drawn["target"][: n["target"]], confidence=level["target"], exact=looks["target"] > 1)
    losses = {
        what: paired_proportion_difference(drawn[what][: n[what]], np.zeros(n[what]), confidence=level[lane])
        for what, lane in (("neighbor", "neighbor"), ("anchor", "target"))
    }
    kept = Decision.of(*losses["neighbor"][:3], -0.05, "at least")
    like = Decision.of(*losses["anchor"][:3], -0.5, "at least")
    return Parts((Decision.of(*share[:3], 0.2, "at most"),), kept, None, like)


def is_firm(parts: Parts) -> bool:
    gone = parts.removed
    return gone.settled and (not gone.within or (parts.neighbors.settled and parts.anchor.settled))


def one_change(rng: np.random.Generator, n: int, gained: float, lost: float) -> np.ndarray:
    drawn = rng.random(n)
    return (drawn < gained).astype(float) - (drawn > 1 - lost)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20_000)
    repeats = parser.parse_args().repeats
    shares(repeats)
    changes(repeats)
    typical(max(20, repeats // 400))
    rows(max(20, repeats // 200))
