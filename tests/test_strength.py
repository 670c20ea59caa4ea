"""The search for a row's strength: where it stops, what it takes when nothing serves, that it errs no more often than it says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from concept_ablation.evaluation.validation import Finding, Spending
from concept_ablation.methods.strength import Change, Look, Search, look_at


class FakeTraining:
    """A training that adds 1 to its only parameter with each step, so that the parameter tells the strength."""

    def __init__(self):
        self.parameters, self.step, self.written = {"w": nn.Parameter(torch.full((1,), 10.0))}, 0, 0

    def take(self, steps):
        with torch.no_grad():
            self.parameters["w"].add_(steps)
        self.step += steps

    def write(self):
        self.written += 1


def finding(share, harm, limit=0.2):
    """What a look sees whose target is in `share` of the pictures and whose anchor lost `harm`; a bound is 0.1 beyond a value."""
    looked = share <= limit
    loss = harm if looked else None
    excess = max(share - limit, *([harm - 0.5] if looked else []), -1)
    return Finding(
        gone=share + 0.1 <= limit, kept=harm + 0.1 <= 0.5 if looked else None, excess=excess, target="owl", target_share=share,
        target_limit=limit, target_excess=share - limit, target_excess_high=share + 0.1 - limit,
        target_typical=None, anchor_loss=loss,
        anchor_loss_high=loss and loss + 0.1, neighbor_loss=None, neighbor_loss_high=None, worst_neighbor=None,
        worst_neighbor_loss=None, worst_neighbor_loss_high=None, pictures=1, seconds=0.0,
    )  # fmt: skip


def climb(erase, harm, scales=(1.0, 2.0), steps=(10, 20, 40)):
    """Looks at a fake training whose target share and harm are functions of the strength."""
    training, search = FakeTraining(), Search(spending=Spending(0.05))
    change = Change(training)

    def judge(spending):
        strength = float(training.parameters["w"].detach()) - 10
        return finding(erase(strength), harm(strength))

    for step in steps:
        training.take(step - training.step)
        ended = look_at(search, change, judge, (0, "{}", step), scales)
        assert (
            float(training.parameters["w"].detach()) == 10 + step
        )  # the training goes on from where it stood
        if ended:
            break
    return search


def places(search):
    return [(look.step, look.scale) for look in search.looks]


def test_it_stops_at_the_smallest_strength_that_serves():
    search = climb(lambda s: 0.0 if s >= 20 else 0.9, lambda s: 0.0, scales=(1.0,))
    assert places(search) == [(10, 1.0), (20, 1.0)]
    assert search.looks[search.chosen].reached and float(search.best["w"]) == 30


def test_a_larger_scale_saves_steps():
    search = climb(lambda s: 0.0 if s >= 20 else 0.9, lambda s: 0.0)
    assert places(search) == [(10, 1.0), (10, 2.0)]
    assert float(search.best["w"]) == 30  # start + 2 x the change of 10 steps


def test_where_it_harms_it_looks_between():
    search = climb(lambda s: 0.0 if s >= 6 else 0.9, lambda s: 0.6 if s > 8 else 0.1)
    assert places(search) == [(10, 1.0), (10, 0.5), (10, 0.75)]
    assert search.looks[search.chosen].reached and float(search.best["w"]) == 17.5
    search = climb(lambda s: 0.0 if s >= 12 else 0.9, lambda s: 0.6 if s > 15 else 0.1)
    assert places(search) == [(10, 1.0), (10, 2.0), (10, 1.5)]
    assert search.looks[search.chosen].reached


def test_a_rung_ends_where_more_strength_would_only_harm_more():
    search = climb(lambda s: 0.0 if s >= 9 else 0.9, lambda s: 0.6 if s > 2 else 0.0)
    assert places(search) == [(10, 1.0), (10, 0.5), (10, 0.75)]
    assert not search.looks[search.chosen].reached


def test_when_nothing_serves_the_nearest_is_taken():
    search = climb(lambda s: 0.9 - s / 100, lambda s: 0.0)
    assert search.chosen == len(search.looks) - 1 and search.looks[-1].scale == 2.0
    harmful = climb(lambda s: 0.0, lambda s: 0.55, scales=(1.0,))
    assert harmful.looks[harmful.chosen].finding.excess == pytest.approx(0.05)


def test_a_first_look_that_serves_is_taken_even_if_a_later_one_has_more_room():
    search = climb(lambda s: max(0.0, 0.3 - s / 50), lambda s: 0.0, scales=(1.0,))
    assert search.chosen == len(search.looks) - 1
    assert search.looks[search.chosen].step == 10


def test_looks_survive_a_checkpoint():
    search = climb(lambda s: 0.9, lambda s: 0.0)
    assert [Look.of(look.line()) for look in search.looks] == search.looks


def test_no_more_is_spent_than_there_is():
    spending = Spending(0.05)
    spent = [spending.next() for _ in range(20)]
    assert sum(spent) < 0.05 and spent[:3] == [0.025, 0.0125, 0.00625]
    assert (
        Spending(0.05, used=9).next() == spent[9]
    )  # a search that was stopped goes on spending where it was


def test_where_it_harms_at_the_largest_scale_it_looks_twice_between():
    scales = (1.0, 1.5, 2.0, 4.0)
    found = climb(lambda s: 0.0 if s >= 35 else 0.9, lambda s: 0.6 if s > 30 else 0.1, scales=scales)
    assert places(found) == [(10, scale) for scale in (*scales, 3.0, 3.5)]


def test_a_target_that_is_there_is_seldom_taken_for_gone():
    """A target in exactly its limit's share of the pictures: twenty looks, a batch of 24 that chooses and up to four that prove."""
    from concept_ablation.evaluation.statistics import proportion

    random, wrong, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        spending, gone = Spending(0.05), False
        for _ in range(20):
            if not gone and (random.random(24) < 0.2).mean() <= 0.2:
                error = spending.next()
                gone = proportion(random.random(48) < 0.2, confidence=1 - 2 * error).high <= 0.2
        wrong += gone
    assert wrong / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
