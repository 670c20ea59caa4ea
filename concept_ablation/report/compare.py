"""Rows of one target beside each other, at equal erasure: what each way of removing it left of the rest.

Ways are compared fairly only where they remove as much. Rows whose strength was searched stop by one rule, the smallest strength at
which the target's upper bound on validation pictures lies below its limit; so what they kept can be compared. A row of a fixed
strength, or one whose search didn't get there, is listed and marked.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.report.formatting import points, printable, share

HEADS = ("", "row", "target", "neighbors", "worst neighbor", "anchor", "KID neighbors", "KID anchor", "s")
SUMMARY = "report/summary.parquet"


class CompareError(UserError):
    """There is nothing to compare; the message says what is needed."""


def compare_rows(results: str | os.PathLike) -> str:
    """The table, one block a target that several finished rows remove. Raises CompareError."""
    path = Path(results) / SUMMARY
    if not path.is_file():
        raise CompareError(
            f"{path}: there is no such table; run the workflow first, or name its results folder"
        )
    groups: dict[tuple, list[Mapping]] = defaultdict(list)
    for line in pq.read_table(path).to_pylist():
        groups[line["kind"], line["target"], line["anchor"]].append(line)
    several = {place: lines for place, lines in groups.items() if len(lines) > 1}
    if not several:
        raise CompareError(
            f"{path}: no target is removed by two rows. Name it in several rows of the table, each with its own column 'concept' "
            "and the settings, preset or method to compare"
        )
    blocks = [
        _block(place, sorted(lines, key=lambda line: line["concept"])) for place, lines in several.items()
    ]
    note = "* not at equal erasure: the strength was fixed, or no strength got there. Changes in points; KID x 1000."
    return "\n\n".join([*blocks, note])


def _block(place: Sequence[str], lines: Sequence[Mapping]) -> str:
    kind, target, anchor = place
    table = [HEADS]
    for line in lines:
        worst = line["worst_neighbor_typical_change"]
        table.append(
            (
                "" if line["strength_found"] else "*",
                printable(line["concept"], 40),
                f"{share(line['presence_base'])} -> {share(line['presence_ablated'])}",
                points(line["neighbor_recognition_change"]),
                "–" if worst is None else f"{points(worst)} {printable(line['worst_neighbor'], 20)}",
                points(line["anchor_typical_change"]),
                _number(line["neighbor_kid_x1000"]),
                _number(line["anchor_kid_x1000"]),
                _number((line["training_seconds"] or 0) + (line["validation_seconds"] or 0)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return "\n".join([f"{kind} {printable(target, 60)} -> {printable(anchor, 40)}", *rows])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
