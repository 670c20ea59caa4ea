"""The exact interval of a share: Clopper and Pearson (1934)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp, floor, lgamma, log, log1p

HALVINGS = 45  # of [0, 1]: to 13 digits


def clopper_pearson(count: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval of a share of which `count` of `n` were seen, 0 <= count <= n: it holds at least so often as it says.

    Its ends are the shares at which so many, or so few, have a chance of (1 - confidence) / 2. A count that is no whole number, since
    ties count half, is rounded outwards.
    """
    tail = (1 - confidence) / 2
    few, many = floor(count), ceil(count)
    ways = _ways(n)
    low = 0.0 if few == 0 else _crossing(lambda p: 1 - _at_most(few - 1, ways, p) < tail)
    high = 1.0 if many == n else _crossing(lambda p: _at_most(many, ways, p) > tail)
    return low, high


def _crossing(below: Callable[[float], bool]) -> float:
    """The share from which on `below`, which holds of the smallest ones, holds no longer."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def at_most(count: int, n: int, p: float) -> float:
    """The chance of at most `count` of `n` independent events of probability p, 0 < p < 1."""
    return _at_most(count, _ways(n), p)


def _ways(n: int) -> list[float]:
    return [lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) for k in range(n + 1)]


def _at_most(count: int, ways: Sequence[float], p: float) -> float:
    """The chance of at most `count` independent events of probability p, 0 < p < 1; `ways`: the logarithms of n over 0, 1, ..., n."""
    n, yes, no = len(ways) - 1, log(p), log1p(-p)
    return min(1.0, sum(exp(ways[k] + k * yes + (n - k) * no) for k in range(count + 1)))
