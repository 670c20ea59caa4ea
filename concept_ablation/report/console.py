"""How a run came out, as text for a terminal: a line a row, then bundles, who harms whom, attacks, and where the report is."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import pyarrow.parquet as pq

from concept_ablation import verdict
from concept_ablation.registries import METRICS
from concept_ablation.report.bundles import bundle_text, general_text, read_bundles
from concept_ablation.report.comebacks import attacks_text, read_attacks
from concept_ablation.report.formatting import printable, share
from concept_ablation.report.tables import missing_rows
from concept_ablation.report.triage import VERDICT_COLORS
from concept_ablation.report.victims import interference_text, read_interference

TERMINAL_MARKS = {"good": "ok", "warn": "!!", "bad": "no"}
"""Colour of a verdict -> its mark in a terminal."""


def print_summary(
    summary_path: str | Path,
    report_path: str | Path,
    file: TextIO | None = None,
    most: int = 40,
    bundles_path: str | Path | None = None,
    interference_path: str | Path | None = None,
    attacks_path: str | Path | None = None,
) -> None:
    """Prints how each row came out, one line a row (at most `most`), how each bundle did, and where the report is.

    To stderr if `file` is None.
    """
    table = pq.read_table(summary_path)
    lines, missing = table.to_pylist(), missing_rows(table)
    text = [summary_text(lines[:most])] if lines else []
    text += [f"... and {len(lines) - most} more in the report"] if len(lines) > most else []
    text += ["", f"{headline(lines)}."]
    measured = read_interference(interference_path)
    text += [f"Who harms whom: {interference_text(measured)}."] if measured else []
    # What never left can't come back.
    gone = {line["concept"] for line in lines if line["verdict"] != verdict.PRESENT}
    tried = {name: found for name, found in read_attacks(attacks_path).items() if name in gone}
    text += [f"{attacks_text(tried)}."] if tried else []
    for name, rows in read_bundles(bundles_path).items():
        text.append(f"Bundle {name}: {bundle_text(rows)}.")
        text += [f"  {found}." for found in [general_text(rows[0])] if found]
    text.append(f"Report: {report_path}")
    text += [f"Rows that are not in it, since they are not finished: {len(missing)}"] if missing else []
    print("\n".join(text), file=file or sys.stderr)


def headline(lines: Sequence[Mapping]) -> str:
    """How many concepts are gone, in one sentence without its full stop."""
    fine = sum(VERDICT_COLORS.get(line["verdict"]) == "good" for line in lines)
    noun = "concept" if len(lines) == 1 else "concepts"
    return f"{fine} of {len(lines)} {noun} removed with neighbors intact"


def summary_text(lines: Sequence[Mapping]) -> str:
    """The summary as aligned ASCII: verdict, target, neighbors and anchor before -> after, with 95 % intervals."""
    heads = (
        "target still there",
        "neighbors recognised, change in points",
        "worst neighbor",
        "anchor typical",
    )
    table = [("", "concept", "verdict", "", *heads)]
    for line in lines:
        table.append(
            (
                TERMINAL_MARKS.get(VERDICT_COLORS.get(line["verdict"]), "??"),
                printable(line["concept"], 28),
                line["verdict"],
                line["firmness"],
                f"{_change_text(line, 'presence')} {METRICS[line['measure']].label}",
                _change_text(line, "neighbor_recognition", difference=True),
                _worst_text(line),
                f"{share(line['anchor_typical_base'])} -> {share(line['anchor_typical_ablated'])}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def count_verdicts(lines: Sequence[Mapping]) -> dict[str, int]:
    """Rows by verdict, in the order of `verdict.VERDICTS`, without zeros."""
    found = [line["verdict"] for line in lines]
    return {
        words: found.count(words) for words in dict.fromkeys((*verdict.VERDICTS, *found)) if words in found
    }


def _change_text(line: Mapping, column: str, difference: bool = False) -> str:
    """ "97% -> 3% [0%, 13%]", or with the paired difference and its interval; "-" where nothing was measured."""
    if line[f"{column}_base"] is None:
        return "-"
    text = f"{share(line[f'{column}_base'])} -> {share(line[f'{column}_ablated'])}"
    name = f"{column}_change" if difference else f"{column}_ablated"
    value, low, high = (line[name + end] for end in ("", "_low", "_high"))
    if difference:
        return f"{text}, {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{text} [{share(low)}, {share(high)}]"


def _worst_text(line: Mapping) -> str:
    """ "duck, -12.5": the neighbor whose `typical` fell most, and by how many points; "-" for none."""
    if not line.get("worst_neighbor"):
        return "-"
    return f"{printable(line['worst_neighbor'], 20)}, {100 * line['worst_neighbor_typical_change']:+.1f}"
