"""What tables, page and terminal say of a row's victims, read in the table that `interference.aggregate_interference` wrote."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq


def read_interference(path: str | Path | None) -> dict[str, list[dict]]:
    """The table's lines by concept, in the order of the victims; none without a table."""
    found: dict[str, list[dict]] = {}
    for line in pq.read_table(path).to_pylist() if path and Path(path).is_file() else ():
        found.setdefault(line["concept"], []).append(line)
    return found


def drawn_victims(measured: Mapping[str, Sequence[Mapping]]) -> int:
    """How many pairs of a row and a victim have pictures of their own: those that the row doesn't draw anyway."""
    return sum(not line["probed"] for lines in measured.values() for line in lines)


def harmed_first(lines: Iterable[Mapping]) -> list[Mapping]:
    """The harmed lines, those that lost most first."""
    return sorted((line for line in lines if line["harmed"]), key=lambda line: line["change"])


def victim_columns(lines: Sequence[Mapping] | None) -> dict:
    """The summary's columns of one row: its victims, worst first, and how many subjects were measured; None without any."""
    victims = None if lines is None else [line["victim"] for line in harmed_first(lines)]
    return {"victims": victims, "victims_measured": None if lines is None else len(lines)}


def interference_text(measured: Mapping[str, Sequence[Mapping]], most: int = 10) -> str:
    """Who harms whom, without a full stop: `2 of 38 measured pairs harmed: fox harms dog (-44), owl (-31)`, or `None of ...`."""
    lines = [line for own in measured.values() for line in own]
    harmed = harmed_first(lines)
    by_row: dict[str, list[str]] = {}
    for line in harmed[:most]:
        by_row.setdefault(line["concept"], []).append(f"{line['victim']} ({100 * line['change']:+.0f})")
    text = f"{len(harmed) or 'None'} of {len(lines)} measured pairs harmed"
    named = "; ".join(f"{concept} harms {', '.join(victims)}" for concept, victims in by_row.items())
    more = f"; and {len(harmed) - most} more" if len(harmed) > most else ""
    return f"{text}: {named}{more}" if harmed else text
