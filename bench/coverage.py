"""How often the intervals of `typical`, of a style's two shares and of the worst neighbor hold the true value, simulated.

    python bench/coverage.py [--repeats 600]

About ten minutes on one core. docs/report.md keeps the table. Image features are points on a sphere in 64 dimensions: a
centre for each prompt, noise of each seed, and for the ablated model a shift of all images or of a share of them. The true
change is the mean over all repeats: what other seeds give on average.
"""

from __future__ import annotations

import argparse

import numpy as np

from concept_ablation.evaluation.statistics import paired_proportion_difference, proportion, share_difference
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change

SIZE, NOISE = 64, 0.0625  # NOISE: of a feature's coordinates, beside a centre of length 1
SIZES = (16, 24, 40, 100)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class World:
    """Draws the features of a probe's images by the base and by the ablated model, (n, SIZE) each."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.centres = unit(self.rng.normal(size=(10, SIZE)) / np.sqrt(SIZE) + np.eye(SIZE)[0])
        self.shift = unit(self.rng.normal(size=SIZE))

    def images(self, n: int, prompts: int) -> np.ndarray:
        return unit(self.centres[np.arange(n) % prompts] + NOISE * self.rng.normal(size=(n, SIZE)))

    def some_change(self, n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Ten prompts; a share of the images, whichever, moves away."""
        base = self.images(n, 10)
        moved = unit(base + 0.5 * self.shift)
        return base, np.where(self.rng.random(n)[:, None] < share, moved, base)

    def all_shift(self, n: int, size: float) -> tuple[np.ndarray, np.ndarray]:
        """One tight cluster; every image moves by the same."""
        base = self.images(n, 1)
        return base, unit(base + size * self.shift)

    def all_new(self, n: int, size: float) -> tuple[np.ndarray, np.ndarray]:
        """The same, and each image is a new one besides."""
        return self.images(n, 1), unit(self.images(n, 1) + size * self.shift)


def share_that_holds(intervals: list[tuple[float, float]], truth: float) -> str:
    held = np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in intervals])
    return f"{held:.2f}".replace("0.", ".")


def typical_table(repeats: int) -> None:
    print(
        "| images | n | true change | Bonett-Price, the limit as if fixed | redrawn-limit |\n|---|---|---|---|---|"
    )
    cases = [
        ("ten prompts, a third of the images changed", World.some_change, 0.33),
        ("one tight cluster, all shifted a little", World.all_shift, 0.2),
        ("one tight cluster, all shifted", World.all_shift, 0.3),
        ("one tight cluster, all new and shifted", World.all_new, 0.3),
    ]
    for label, draw, size in cases:
        for n in SIZES:
            world, fixed, redrawn, values = World(), [], [], []
            for seed in range(repeats):
                sides = NearestNeighbors.of(*draw(world, n, size))
                found = typical_change([sides], draws=500, seed=seed)
                other = paired_proportion_difference(*reversed(sides.typical()))
                values.append(found.value)
                fixed.append(other[1:3])
                redrawn.append(found[1:3])
            truth = float(np.mean(values))
            held = share_that_holds(fixed, truth), share_that_holds(redrawn, truth)
            print(f"| {label} | {n} | {100 * truth:+.0f} points | {held[0]} | {held[1]} |", flush=True)


def targets_table(repeats: int) -> None:
    """Three targets that became like the anchor, pooled: the anchor's images, their common reference, are few and draw a limit."""
    print(
        "\n| three targets, n images of each and of the anchor | true change | own redraw each | common redraw |"
        "\n|---|---|---|---|"
    )
    for n in SIZES:
        world, values, held = World(), [], {True: [], False: []}
        for seed in range(repeats):
            anchor, targets = world.images(n, 1), []
            for _ in range(3):
                base, after = world.images(n, 1), unit(world.images(n, 1) + 0.2 * world.shift)
                targets.append(NearestNeighbors.of(unit(base - 5 * world.shift), after, anchor))
            # References that differ, by however little, are drawn each for itself.
            apart = [one._replace(reference=one.reference + 1e-12 * i) for i, one in enumerate(targets)]
            for common, given in ((True, targets), (False, apart)):
                found = typical_change(given, draws=500, seed=seed)
                held[common].append((found.low, found.high))
            values.append(found.value)
        truth = float(np.mean(values))
        own, common = (share_that_holds(held[common], truth) for common in (False, True))
        print(f"| {n} | {100 * truth:+.0f} points | {own} | {common} |", flush=True)


def style_table(repeats: int, margin: float = 0.1) -> None:
    """How often a style that lies on the wrong side of its limit, by a little, is called firmly removed."""
    rng = np.random.default_rng(1)
    print(
        "\n| true shares: target, neutral | target's interval alone | both shares' interval |\n|---|---|---|"
    )
    for neutral in (0.1, 0.25, 0.4):
        target, wrong = neutral + margin + 0.01, np.zeros(2)
        for _ in range(10 * repeats):
            after, before = (rng.random(40) < target).astype(float), (rng.random(24) < neutral).astype(float)
            limit = before.mean() + margin
            wrong += [proportion(after).high <= limit, share_difference(after, before).high <= margin]
        alone, joint = wrong / (10 * repeats)
        print(f"| {target:.2f}, {neutral:.2f} | {alone:.3f} | {joint:.3f} |", flush=True)


def worst_table(repeats: int) -> None:
    """How often the interval of the neighbor that was chosen for its loss holds that neighbor's true change."""
    print(
        "\n| neighbors of 16 images, all with the same true change | its own interval | corrected |\n|---|---|---|"
    )
    for count in (4, 10):
        truth = np.mean([_change(World(seed), 0.95, seed).value for seed in range(4 * repeats)])
        held = np.zeros(2)
        for repeat in range(repeats):
            seeds = range(10**6 + repeat * count, 10**6 + (repeat + 1) * count)
            worst = min(seeds, key=lambda seed: _change(World(seed), 0.95, seed).value)
            for place, level in enumerate((0.95, 1 - 0.05 / count)):
                found = _change(World(worst), level, worst)
                held[place] += found.low <= truth <= found.high
        own, corrected = held / repeats
        print(f"| {count}: {100 * truth:+.0f} points | {own:.2f} | {corrected:.2f} |", flush=True)


def _change(world: World, confidence: float, seed: int):
    sides = NearestNeighbors.of(*world.all_shift(16, 0.2))
    return typical_change([sides], confidence=confidence, draws=500, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=600)
    repeats = parser.parse_args().repeats
    typical_table(repeats)
    targets_table(repeats)
    style_table(repeats)
    worst_table(repeats)
