"""A measured value beside its limit: within it or beyond, and whether its interval agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ROUNDING = 1e-9
"""A loss of exactly 5 points is "at most 5 points", whatever floats make of it."""


@dataclass(frozen=True)
class Decision:
    """One measured value beside its limit. excess: how far it lies beyond, with its interval; negative: within.

    settled: the interval lies wholly on the value's side of the limit.
    """

    within: bool
    settled: bool
    excess: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    @classmethod
    def of(
        cls, value: float, low: float, high: float, limit: float, side: Literal["at most", "at least"]
    ) -> Decision:
        """The decision on `value` with its interval; side: where the limit wants it."""
        if side == "at least":
            value, low, high, limit = -value, -high, -low, -limit
        excess, low, high = value - limit, low - limit, high - limit
        within = excess <= ROUNDING
        return cls(within, high <= ROUNDING if within else low > ROUNDING, excess, low, high)
