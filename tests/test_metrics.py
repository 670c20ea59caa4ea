"""Each metric against a formula written another way, or an example worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from concept_ablation.evaluation import statistics as metrics


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def test_cosine_and_clip_score_by_hand():
    images = unit([[1, 0], [1, 1], [-1, 0]])
    cosines = metrics.cosine(images, np.array([1.0, 0.0]))
    np.testing.assert_allclose(cosines, [1, 0.70710678, -1])
    np.testing.assert_allclose(metrics.clip_score(cosines), [2.5, 1.76776695, 0])


def test_recognised_is_the_paper_s_clip_accuracy_for_two_texts(rng):
    images, texts = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(2, 8)))
    strict = [2.5 * max(i @ texts[0], -9) > 2.5 * max(i @ texts[1], -9) for i in images]
    np.testing.assert_array_equal(metrics.recognised(images, texts, 0), strict)
    np.testing.assert_allclose(metrics.recognised(images, texts, 0) + metrics.recognised(images, texts, 1), 1)


def test_ties_are_shared_so_that_a_text_against_itself_is_undecided():
    image, other = np.array([[1.0, 0.0]]), np.array([0.0, 1.0])
    same = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert metrics.recognised(image, same, 0) == 0.5
    assert metrics.recognised(image, np.vstack([same, other]), 1) == 0.5
    assert metrics.recognised(image, np.vstack([same, other]), 2) == 0
    assert metrics.recognised(image, np.vstack([same, same[:1]]), 0) == pytest.approx(1 / 3)
    rounded = same * [[1.0], [1 - 1e-8]]  # the same text, encoded in another batch
    assert metrics.recognised(image, rounded, 1) == 0.5


def test_wilson_interval_against_scipy_and_at_the_ends():
    for hits, n in [(0, 32), (3, 32), (16, 32), (32, 32), (1, 1)]:
        ours = metrics.proportion(np.repeat([1.0, 0.0], [hits, n - hits]))
        theirs = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert (ours.value, ours.n) == (hits / n, n)
        np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], atol=1e-12)
    assert ours.high == 1 and ours.low > 0


def test_bonett_price_interval_by_hand():
    # 10 pairs: 3 lost, 1 gained. p_gain = 2/12, p_loss = 4/12, d = -2/12, se = sqrt((6/12 - 4/144) / 12)
    after, before = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    result = metrics.paired_proportion_difference(after, before)
    half = 1.959964 * np.sqrt((6 / 12 - 4 / 144) / 12)
    assert result.value == pytest.approx(-0.2)
    np.testing.assert_allclose([result.low, result.high], [-2 / 12 - half, -2 / 12 + half], atol=1e-6)


def test_no_change_at_all_still_has_an_interval():
    ones = np.ones(30)
    result = metrics.paired_proportion_difference(ones, ones)
    assert result.value == 0 and result.low < -0.02 and result.high > 0.02
    bootstrap = metrics.paired_difference(ones, ones)
    assert bootstrap.low == bootstrap.high == 0  # why shares don't use it


def test_bootstrap_interval_is_close_to_the_t_interval_and_seeded(rng):
    values = rng.normal(3, 2, size=400)
    ours = metrics.mean(values, draws=4000, seed=5)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    np.testing.assert_allclose([ours.value, ours.low, ours.high], [values.mean(), low, high], atol=0.02)
    assert ours == metrics.mean(values, draws=4000, seed=5) != metrics.mean(values, draws=4000, seed=6)
    assert metrics.mean(values, confidence=0.5, seed=5).high < ours.high


def test_groups_keep_their_size_so_their_difference_is_no_noise():
    values, groups = np.repeat([0.0, 10.0], 20), np.repeat(["owl", "duck"], 20)
    assert metrics.mean(values, groups=groups).low == metrics.mean(values, groups=groups).high == 5
    assert metrics.mean(values).high - metrics.mean(values).low > 2
    counts = metrics.resample(groups, 7, 0)
    assert (counts[:, :20].sum(1) == 20).all() and (counts[:, 20:].sum(1) == 20).all()


def test_pairs_make_the_difference_sharper_than_its_sides(rng):
    before = rng.normal(0, 5, size=200)
    after = before + rng.normal(1, 0.1, size=200)
    result = metrics.paired_difference(after, before)
    assert result.value == pytest.approx(np.mean(after - before))
    assert result.high - result.low < 0.05
    with pytest.raises(ValueError, match="same seeds"):
        metrics.paired_difference(after[:3], before)


def test_kid_against_explicit_sums(rng):
    x, y = unit(rng.normal(size=(7, 5))), unit(rng.normal(0.5, 1, size=(7, 5)))
    scaled_x, scaled_y = (
        x * np.sqrt(5),
        y * np.sqrt(5),
    )  # the published kernel works on features of this length

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    total = 0.0
    for i in range(7):
        for j in range(7):
            if i != j:
                total += k(scaled_x[i], scaled_x[j]) + k(scaled_y[i], scaled_y[j])
                total -= k(scaled_x[i], scaled_y[j]) + k(scaled_x[j], scaled_y[i])
    assert metrics.kid(x, y) == pytest.approx(total / 42)
    assert metrics.kid(x, y) == pytest.approx(metrics.kid(y, x))


def test_kid_of_a_model_with_itself_is_zero_and_of_others_positive(rng):
    x = unit(rng.normal(size=(30, 6)))
    assert metrics.kid(x, x) == pytest.approx(0, abs=1e-12)
    assert metrics.kid(x, unit(rng.normal(2, 1, size=(30, 6)))) > 0.5


def test_kid_is_unbiased(rng):
    """Sets of one distribution give 0 on average, and a small set the same as a large one."""
    null = [metrics.kid(unit(rng.normal(size=(8, 4))), unit(rng.normal(size=(8, 4)))) for _ in range(3000)]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(3000)
    small = [
        metrics.kid(unit(rng.normal(size=(5, 4))), unit(rng.normal(1, 1, size=(5, 4)))) for _ in range(2000)
    ]
    large = metrics.kid(unit(rng.normal(size=(2000, 4))), unit(rng.normal(1, 1, size=(2000, 4))))
    assert np.mean(small) == pytest.approx(large, rel=0.05)


def test_kid_interval_holds_the_value_and_pools_by_size(rng):
    pairs = [(unit(rng.normal(size=(n, 6))), unit(rng.normal(0.4, 1, size=(n, 6)))) for n in (20, 40)]
    pooled = metrics.kid_estimate(pairs)
    assert pooled.low < pooled.value < pooled.high and pooled.n == 60
    assert pooled.value == pytest.approx((20 * metrics.kid(*pairs[0]) + 40 * metrics.kid(*pairs[1])) / 60)
    assert metrics.kid_estimate(pairs) == pooled


def test_redrawn_kids_average_to_the_value(rng):
    """Redrawn seeds must not be compared with themselves: that would push the whole interval up."""
    x, y = unit(rng.normal(size=(25, 6))), unit(rng.normal(0.4, 1, size=(25, 6)))
    assert metrics._kid_redrawn(x, y, 4000, 0).mean() == pytest.approx(metrics.kid(x, y), rel=0.03)


@pytest.mark.parametrize("bad", [(1, 1), (3, 4)])
def test_kid_refuses_what_it_cannot_compare(bad):
    with pytest.raises(ValueError, match="at least 2 images"):
        metrics.kid(np.ones((bad[0], 2)), np.ones((bad[1], 2)))


def test_empty_sets_are_refused():
    with pytest.raises(ValueError, match="no images"):
        metrics.mean(np.array([]))


def test_several_own_texts_count_together():
    images = unit([[1, 0.1, 0], [0.1, 1, 0], [0, 0.1, 1]])
    np.testing.assert_array_equal(metrics.recognised(images, np.eye(3), [0, 1]), [1, 1, 0])
    tie = unit([[1, 1, 1]])
    assert metrics.recognised(tie, np.eye(3), [0, 1]) == pytest.approx(2 / 3)


def test_joint_draws_take_the_same_members_of_every_group():
    groups = np.repeat([0, 1, 2], 5)
    counts = metrics.resample(groups, 50, 0, joint=True).reshape(50, 3, 5)
    assert (counts == counts[:, :1]).all() and (counts.sum(2) == 5).all()
    loose = metrics.resample(groups, 50, 0).reshape(50, 3, 5)
    assert (loose != loose[:, :1]).any()
    with pytest.raises(ValueError, match="groups of 5 and 4 images share no seeds"):
        metrics.resample(groups[:-1], 50, 0, joint=True)


def test_joint_interval_is_that_of_the_seeds_means(rng):
    """Clusters of equal size: the bootstrap over seeds is the bootstrap of the seeds' means."""
    values = rng.normal(size=(3, 40)) + rng.normal(size=40)
    pooled = metrics.mean(values.ravel(), groups=np.repeat([0, 1, 2], 40), joint=True)
    means = metrics.mean(values.mean(axis=0))
    np.testing.assert_allclose([pooled.low, pooled.high], [means.low, means.high])


def test_the_difference_of_two_shares_is_newcombe_s():
    """Newcombe (1998), table II, method 10, worked examples: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/10."""
    for (a, n), (b, m), value, low, high in [
        ((56, 70), (48, 80), 0.2, 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.6, 0.1705, 0.8090),
        ((10, 10), (0, 10), 1.0, 0.6075, 1.0),
    ]:
        one, other = np.repeat([1.0, 0.0], [a, n - a]), np.repeat([1.0, 0.0], [b, m - b])
        found = metrics.share_difference(one, other)
        assert (found.n, found.interval) == (n, "newcombe")
        np.testing.assert_allclose([found.value, found.low, found.high], [value, low, high], atol=1e-4)
