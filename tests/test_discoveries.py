"""False discoveries over the rows: p-values that say what the verdict's intervals say, and their adjustment."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

from concept_ablation import verdict
from concept_ablation.evaluation.statistics import paired_proportion_difference, proportion, share_difference
from concept_ablation.report.discoveries import (
    CLAIMS,
    LEVEL,
    Share,
    claim_columns,
    claim_p,
    loss_p,
    share_above_p,
    share_p,
    wilson,
)
from concept_ablation.verdict import decide, presence_of
from tests.shipped import thresholds
from tests.test_tables import score_line


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def images(ones, count):
    return np.repeat([1.0, 0.0], [ones, count - ones])


def test_a_shares_p_is_its_interval_turned_round(rng):
    for _ in range(40):
        count = int(rng.integers(8, 100))
        ones, limit = int(rng.integers(0, count // 2)), float(rng.uniform(0.05, 0.6))
        found, given = share_p(Share(ones / count, count), limit), images(ones, count)
        assert (found <= LEVEL) == (proportion(given).high <= limit) and (found < 1) == (ones / count < limit)
        if 1e-12 < found < 1:
            assert proportion(given, confidence=1 - found).high == pytest.approx(limit, abs=1e-6)
        low, high = wilson(Share(ones / count, count), norm.ppf(0.975))
        made = proportion(images(ones, count))
        assert (max(low, 0), high) == pytest.approx((made.low, made.high))
    assert share_p(Share(0.2, 40), 0.2) == share_p(Share(1.0, 40), 0.2) == 1


def test_a_share_that_was_looked_at_several_times_has_the_p_of_its_exact_interval(rng):
    for _ in range(40):
        count, looks = int(rng.integers(16, 100)), int(rng.integers(2, 8))
        ones, limit = int(rng.integers(0, count // 3)), float(rng.uniform(0.05, 0.6))
        found = share_p(Share(ones / count, count, looks), limit)
        made = proportion(images(ones, count), confidence=1 - LEVEL / looks, exact=True)
        assert (found <= LEVEL) == (made.high <= limit)


def test_the_p_of_a_share_above_another_is_newcombes_interval_turned_round(rng):
    for _ in range(20):
        one, other = (images(int(rng.integers(0, n // 2)), n) for n in rng.integers(10, 60, size=2))
        margin = float(rng.uniform(0.05, 0.4))
        excess = one.mean() - other.mean() - margin
        found = share_above_p(Share(one.mean(), len(one)), Share(other.mean(), len(other)), margin)
        upper = share_difference(one, other).high - margin
        assert (found <= LEVEL) == (upper <= 0) and (found == 1) == (excess >= 0)
        if 1e-6 < found < 1:
            assert share_difference(one, other, confidence=1 - found).high == pytest.approx(margin, abs=1e-6)


def test_a_loss_is_sure_where_its_interval_lies_beyond_the_limit(rng):
    for _ in range(40):
        before = rng.integers(0, 2, size=40).astype(float)
        after = before * (rng.random(40) > rng.uniform(0, 0.6))
        for several in (1, 4):
            made = paired_proportion_difference(after, before, confidence=1 - LEVEL / several)
            p = loss_p(-made.value - 0.05, -made.high - 0.05, 0.95, several)
            assert (p <= LEVEL) == (made.high <= -0.05) and (-made.value > 0.05 or p == 1)
    assert loss_p(0.5, 0.5, 0.95) == pytest.approx(0, abs=1e-12) and loss_p(-0.1, -0.2, 0.95) == 1


def lines_of(shares, change=None, count=40):
    """A row's long table with these targets still there, and its neighbors' change with its interval."""
    made = [proportion(images(ones, count)) for ones in shares]
    lines = [
        score_line("a", "target", "clip_accuracy", "ablated", one.value, one.low, one.high, probe=str(place))
        for place, one in enumerate(made)
    ]
    lines += [
        score_line("a", "target", "clip_accuracy", "base", 1.0, probe=str(place))
        for place in range(len(made))
    ]
    return lines + ([score_line("a", "neighbors", "recognition", "difference", *change)] if change else [])


def test_a_firm_verdict_has_small_p_and_no_other(rng):
    row = {"kind": "object", "targets": ["0"], "neighbors": ["owl", "fox"], "confidence": 0.95}
    for ones in range(0, 40, 3):
        lines = lines_of([ones])
        one = decide("object", presence_of(row, lines), {}, thresholds())
        p = claim_p(row, lines, one.verdict, thresholds())
        assert (p["removed"] <= LEVEL) == (one.removed and one.firmness == "firm"), ones
        assert p["harmed"] is None
    lost = lines_of([0], (-0.2, -0.3, -0.1))
    one = decide("object", presence_of(row, lost), verdict.changes_of(lost), thresholds())
    assert (one.verdict, one.firmness) == (verdict.HARMED, "firm")
    assert claim_p(row, lost, one.verdict, thresholds())["harmed"] == pytest.approx(
        2 * norm.sf(1.959964 * 0.15 / 0.1)
    )


def test_all_targets_must_be_gone_and_any_loss_is_harm():
    row = {"kind": "object", "targets": ["0", "1"], "neighbors": ["owl", "fox"]}
    lines = [
        *lines_of([0, 4], (-0.3, -0.4, -0.2)),
        score_line("a", "anchor", "typical", "difference", 0.0, -0.1, 0.1),
    ]
    p = claim_p(row, lines, verdict.HARMED, thresholds())
    assert p["removed"] == share_p(Share(0.1, 40), 0.2), (
        "the surest claim is as sure as that of the least sure target"
    )
    alone = loss_p(0.25, 0.15, 0.95)
    assert p["harmed"] == pytest.approx(2 * alone), "two tests were made"
    assert claim_p(row, lines, verdict.HARMED, thresholds(), judges_anchor=False)["harmed"] == pytest.approx(
        alone
    )
    assert claim_p(row, lines, verdict.NOT_SHOWN, thresholds())["removed"] is None


def test_claims_are_adjusted_over_the_rows_that_can_make_them(rng):
    values = [float(value) for value in rng.random(9) ** 3]
    rows = [{"removed": value, "harmed": None if place % 3 else value} for place, value in enumerate(values)]
    columns = claim_columns(rows)
    assert [line["removed_p_adjusted"] for line in columns] == pytest.approx(
        list(false_discovery_control(values))
    )
    some = [line["harmed_p_adjusted"] for line in columns if line["harmed_p"] is not None]
    assert some == pytest.approx(list(false_discovery_control(values[::3])))
    for line in columns:
        for claim in CLAIMS:
            p = line[f"{claim}_p_adjusted"]
            assert line[f"{claim}_controlled"] == (None if p is None else p <= LEVEL)
    assert claim_columns([]) == []


def test_of_rows_whose_targets_all_stay_at_their_limit_few_are_claimed(rng):
    """200 tables of 20 rows that share some of their luck, every share exactly at its limit: any claim is false."""
    wrong = 0
    for _ in range(200):
        luck = rng.random(40)
        p = []
        for _ in range(20):
            own = np.where(rng.random(40) < 0.5, luck, rng.random(40))
            p.append(share_p(Share(float(np.mean(own < 0.2)), 40), 0.2))
        wrong += any(
            line["removed_controlled"]
            for line in claim_columns([{"removed": one, "harmed": None} for one in p])
        )
    assert wrong <= 0.05 * 200 + 6
