"""Methods side by side: what each left of the targets that several of them remove, and what that cost the rest.

A row counts where its target is gone (verdict.removed): what a method keeps without removing anything says nothing. Where strengths are
searched by one rule the rows that count stand at equal erasure. Intervals resample targets, so they say how far the mean over other
targets of the kind may lie; with few targets they are wide, with one there is none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.registries import DEFAULT_METHOD, METHODS
from concept_ablation.report.strength import read_looks

DRAWS = 2000
IMPORTED = "imported"
"""What a row of a delta that was made elsewhere is called here."""


@dataclass(frozen=True)
class Measure:
    """What is compared: a title, the number of a summary line, its unit. everywhere: of rows whose target isn't gone, too."""

    title: str
    column: str
    sign: float = 1.0
    unit: str = "share"
    everywhere: bool = False


MEASURES = (
    Measure("target left", "presence_ablated", everywhere=True),
    Measure("target back in other words, the worst", "attack_words_share"),
    Measure("target back under a learned attack", "attack_learned_share"),
    Measure("neighbors not recognised any more", "neighbor_recognition_change", -1.0),
    Measure("worst neighbor not typical any more", "worst_neighbor_typical_change", -1.0),
    Measure("anchor not typical any more", "anchor_typical_change", -1.0),
    Measure("unnamed not recognised any more", "unnamed_change", -1.0),
    Measure("KID x 1000, neighbors", "neighbor_kid_x1000", unit="number"),
    Measure("seconds", "training_seconds", unit="seconds", everywhere=True),
)
"""In the order of table and figure. `unnamed_change` isn't in the summary: bench/compare.py measures it."""


@dataclass
class MethodRows:
    """One method's rows. at_once: how many were gone at the published size, None where no size was searched; searched: of how many."""

    name: str
    lines: list[Mapping] = field(default_factory=list)
    at_once: int | None = None
    searched: int = 0

    @property
    def removed(self) -> int:
        return sum(bool(line["removed"]) for line in self.lines)

    @property
    def found(self) -> str:
        """How many rows a search found a strength for that removes and keeps: those stand at equal erasure."""
        known = [line["strength_found"] for line in self.lines if line.get("strength_found") is not None]
        return f"{sum(known)} of {len(known)}" if known else "–"

    def values(self, measure: Measure, all_rows: bool = False) -> list[float]:
        """The measure's numbers of the rows that count; `all_rows`: of all."""
        lines = [line for line in self.lines if all_rows or measure.everywhere or line["removed"]]
        found = [line.get(measure.column) for line in lines]
        return [measure.sign * value for value in found if value is not None]

    def mean(self, measure: Measure) -> tuple[float, float, float] | None:
        """The mean and its 95 % interval over targets; None without a row that counts. One target has no interval."""
        values = np.sort(self.values(measure))  # the draws must not depend on the order of the rows
        if not len(values):
            return None
        if len(values) == 1:
            return float(values[0]), float("nan"), float("nan")
        draws = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        return float(values.mean()), float(low), float(high)


def method_of_row(row: Mapping) -> str:
    """The method that made a row's delta, as its training record says."""
    path = row.get("training")
    if not path or not Path(path).is_file():
        return IMPORTED
    about = json.loads((pq.read_schema(path).metadata or {}).get(METADATA_KEY, b"{}"))
    return about.get("method", DEFAULT_METHOD)


def compare_methods(rows: Sequence[Mapping], lines: Sequence[Mapping]) -> list[MethodRows]:
    """Each method's rows of the targets that more than one method removes; nothing where there are none.

    rows: the report's, each with its files; lines: the summary's, one a row and in their order.
    """
    together: dict[tuple, list[tuple[Mapping, Mapping]]] = defaultdict(list)
    for row, line in zip(rows, lines, strict=True):
        together[line["kind"], line["target"], line["anchor"]].append((row, line))
    found: dict[str, MethodRows] = {}
    for group in (group for group in together.values() if len(group) > 1):
        named = [(method_of_row(row), row, line) for row, line in group]
        for name, row, line in named if len({name for name, *_ in named}) > 1 else ():
            own = found.setdefault(name, MethodRows(name))
            own.lines.append(line)
            looks = read_looks(row)
            if looks and looks[0]["scale"] == 1 and name != DEFAULT_METHOD:
                own.searched += 1
                own.at_once = (own.at_once or 0) + bool(looks[0]["gone"])
    order = [name for name in (*METHODS, IMPORTED) if name in found]
    return [found[name] for name in order]


def measures_of(methods: Sequence[MethodRows]) -> list[Measure]:
    """The measures that any row has."""
    return [one for one in MEASURES if any(method.values(one) for method in methods)]


def cell(measure: Measure, method: MethodRows) -> str:
    """A mean with its interval, as the table shows it."""
    found = method.mean(measure)
    if found is None:
        return "–"
    write = {"share": _points, "number": _number, "seconds": _seconds}[measure.unit]
    mean, low, high = found
    return write(mean) if np.isnan(low) else f"{write(mean)} ({write(low)} to {write(high)})"


def _points(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-0 %", "0 %").replace("-", "−")


def _number(value: float) -> str:
    return f"{value:.0f}".replace("-0", "0") if abs(value) < 0.5 else f"{value:.0f}".replace("-", "−")


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
