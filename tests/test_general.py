"""General quality: the distance between two models' pictures of neutral prompts, beside that of chance; against plain loops."""

import itertools

import numpy as np
import pytest

from concept_ablation.evaluation.general import quality
from concept_ablation.evaluation.statistics import Bootstrap

FEW = Bootstrap(0.95, 50, 0)


def features(seed, shift=0.0, n=12, d=6):
    drawn = np.random.default_rng(seed).normal(size=(n, d)) + shift
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def found(*sides):
    return {(metric, side): estimate for metric, side, estimate in quality(*sides, FEW)}


def kid_by_loops(x, y):
    """Mean over ordered pairs of different seeds of k(xi, xj) + k(yi, yj) - k(xi, yj) - k(xj, yi)."""

    def k(a, b):
        return (float(a @ b) + 1) ** 3

    pairs = list(itertools.permutations(range(len(x)), 2))
    return sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)


def test_the_distances_are_kids_to_the_base_models_pictures():
    base, bundle, other, texts = features(0), features(1, 1.0), features(2), features(3)
    values = found(base, bundle, other, texts)
    assert values["kid_x1000", "ablated"].value == pytest.approx(1000 * kid_by_loops(bundle, base))
    assert values["kid_x1000", "noise floor"].value == pytest.approx(1000 * kid_by_loops(other, base))
    scores = [
        [2.5 * max(float(a @ b), 0) for a, b in zip(side, texts, strict=True)] for side in (base, bundle)
    ]
    assert values["clip_score_2_5", "base"].value == pytest.approx(np.mean(scores[0]))
    difference = np.subtract(scores[1], scores[0]).mean()
    assert values["clip_score_2_5", "difference"].value == pytest.approx(difference)


def test_a_model_that_changed_nothing_lies_at_zero_and_a_ruined_one_above_the_floor():
    base, other, texts = features(0), features(2), features(3)
    same = found(base, base, other, texts)
    kid, change = same["kid_x1000", "ablated"], same["clip_score_2_5", "difference"]
    assert kid.value == kid.low == kid.high == change.value == 0
    ruined = found(base, features(1, 3.0), other, texts)
    assert ruined["kid_x1000", "ablated"].low > ruined["kid_x1000", "noise floor"].high
