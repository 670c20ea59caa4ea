"""Typical images and the interval of their change, against explicit loops and by how often the interval is right."""

import numpy as np
import pytest

from concept_ablation.evaluation.statistics import paired_proportion_difference
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def shares(base, ablated, reference=None):
    return [side.mean() for side in NearestNeighbors.of(base, ablated, reference).typical()]


def test_typical_against_explicit_loops(rng):
    base, after = unit(rng.normal(size=(25, 4))), unit(rng.normal(size=(25, 4)))

    def nearest(images):
        return [max(images[i] @ base[j] for j in range(25) if j != i) for i in range(25)]

    limit = sorted(nearest(base))[2]  # two of 25 are no more than a tenth of them
    mine, theirs = NearestNeighbors.of(base, after).typical()
    np.testing.assert_array_equal(mine, [value >= limit for value in nearest(base)])
    np.testing.assert_array_equal(theirs, [value >= limit for value in nearest(after)])


@pytest.mark.parametrize("n", [10, 20, 30, 40, 70, 100, 16, 24, 39])
def test_the_base_model_itself_has_no_more_than_a_tenth_outliers(rng, n):
    """Where n is divisible by ten, exactly a tenth: not one fewer."""
    values = rng.permutation(n) / n  # images' nearest cosines, no two equal
    sides = NearestNeighbors(values, values, values, same_seeds=True)
    assert [side.mean() for side in sides.typical()] == pytest.approx([1 - (n // 10) / n] * 2)


def test_new_images_of_the_same_model_are_typical_and_others_are_not(rng):
    """An exchangeable image is beyond the k lowest of n with chance (k + 1) / (n + 1): the rank argument of conformal tests."""
    for n, lowest in ((12, 1), (40, 4)):
        null = [
            shares(*(unit([4, 0, 0, 0] + rng.normal(size=(n, 4))) for _ in range(2)))[1] for _ in range(400)
        ]
        assert np.mean(null) == pytest.approx((n - lowest) / (n + 1), abs=0.03)
    here, there = (unit(centre + rng.normal(size=(40, 4))) for centre in ([6, 0, 0, 0], [0, 6, 0, 0]))
    assert shares(here, there)[1] < 0.1


def test_an_image_is_not_its_own_neighbor(rng):
    """Twins share a seed: a broken image that resembles only its own twin has no neighbor."""
    base = unit(np.vstack([np.eye(6)[0] + rng.normal(0, 0.1, size=(19, 6)), np.eye(6)[5:]]))
    assert NearestNeighbors.of(base, base).typical()[1][-1] == 0


def test_a_reference_of_another_size(rng):
    reference, images = unit([5, 0, 0] + rng.normal(size=(12, 3))), unit(rng.normal(size=(30, 3)))
    for part in (images, images[:7]):
        found = NearestNeighbors.of(part, part, reference)
        assert not found.same_seeds and found.typical()[0].shape == (len(part),)
        estimate = typical_change([found])
        assert (estimate.value, estimate.n) == (0, len(part)) and estimate.low < 0 < estimate.high
    with pytest.raises(ValueError, match="at least 2 reference images, got 1"):
        NearestNeighbors.of(images, images, reference[:1])


def shifted(rng, n, shift):
    """One tight cluster, and the same images moved a little in one direction: all lie near the limit together."""
    base = unit([3, 0, 0, 0, 0, 0] + 0.5 * rng.normal(size=(n, 6)))
    return base, unit(base + [0, shift, 0, 0, 0, 0])


def test_the_limit_s_own_error_is_in_the_interval_of_a_change(rng):
    """With the limit taken as fixed the interval misses the true change far too often; drawn anew it doesn't."""
    found, fixed = [], []
    for seed in range(300):
        sides = NearestNeighbors.of(*shifted(rng, 60, 0.35))
        found.append(typical_change([sides], draws=300, seed=seed))
        fixed.append(paired_proportion_difference(*reversed(sides.typical())))
    truth = np.mean([estimate.value for estimate in found])
    covered, before = (
        np.mean([one.low <= truth <= one.high for one in estimates]) for estimates in (found, fixed)
    )
    assert -0.75 < truth < -0.2  # near neither end, where any interval is right
    assert before < 0.84 and covered > 0.92


def test_the_interval_is_a_bootstrap_over_seeds_with_the_limit_taken_anew(rng):
    """Against explicit loops: draw seeds, sort their reference values, take the limit, count."""
    sides = NearestNeighbors.of(*shifted(rng, 20, 0.3))
    loops, generator = [], np.random.default_rng(7)
    for _ in range(4000):
        drawn = generator.integers(0, 20, 20)
        limit = sorted(sides.reference[drawn])[2] - 1e-6
        loops.append(np.mean(sides.ablated[drawn] >= limit) - np.mean(sides.base[drawn] >= limit))
    found = typical_change([sides], draws=4000)
    wald = paired_proportion_difference(*reversed(sides.typical()))
    low, high = np.quantile(loops, [0.025, 0.975])
    assert found.low == pytest.approx(min(low, wald.low), abs=0.05)
    assert found.high == pytest.approx(max(high, wald.high), abs=0.05)
    assert found.interval == "redrawn-limit"


def test_nothing_changed_still_has_a_width_and_pools_count_images(rng):
    still = [NearestNeighbors.of(*shifted(rng, n, 0)) for n in (16, 24)]
    pooled = typical_change(still)
    assert (pooled.value, pooled.n) == (0, 40) and pooled.low < -0.02 and pooled.high > 0.02
    moved = [NearestNeighbors.of(*shifted(rng, n, 0.4)) for n in (16, 24)]
    each = [typical_change([one]).value for one in moved]
    pooled = typical_change(moved)
    assert pooled.value == pytest.approx((16 * each[0] + 24 * each[1]) / 40)
    assert pooled.low < pooled.value < pooled.high


def test_a_reference_that_several_targets_share_is_drawn_once_for_all(rng):
    """Against explicit loops: in each draw one limit, from one drawing of the anchor's images, judges all three targets."""
    anchor = unit([3, 0, 0, 0, 0, 0] + 0.5 * rng.normal(size=(20, 6)))
    targets = []
    for _ in range(3):
        # Many images lie near the limit: where it falls decides about all of them.
        after = unit(anchor[rng.integers(0, 20, 60)] + 0.25 * rng.normal(size=(60, 6)))
        targets.append(NearestNeighbors.of(unit(after - [6, 0, 0, 0, 0, 0]), after, anchor))
    loops, generator = [], np.random.default_rng(7)
    for _ in range(4000):
        limit = sorted(targets[0].reference[generator.integers(0, 20, 20)])[2] - 1e-6
        gained = [
            np.mean(one.ablated[drawn] >= limit) - np.mean(one.base[drawn] >= limit)
            for one, drawn in ((one, generator.integers(0, 60, 60)) for one in targets)
        ]
        loops.append(np.mean(gained))
    low, high = np.quantile(loops, [0.025, 0.975])
    found = typical_change(targets, draws=4000)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
