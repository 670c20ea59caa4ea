"""Bundles in the report: how each row came out under the model that lacks all concepts of its bundle, beside its own model.

`bundles.parquet` has a line a row of a bundle: the summary's columns, measured under the bundle's model, after `bundle`, `how`,
`verdict_alone` and `removed_alone`, what the row's own model comes to.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.report.summary import summarise, summary_schema
from concept_ablation.report.tables import read_scores, write_table
from concept_ablation.verdict import NOT_SHOWN, read_thresholds

log = logging.getLogger(__name__)
LEADING = {
    "bundle": pa.string(),
    "how": pa.string(),
    "verdict_alone": pa.string(),
    "removed_alone": pa.bool_(),
}


def aggregate_bundles(spec: Mapping, summary_path: str | Path, out_path: str | Path) -> None:
    """Writes the table of all judged bundles to `out_path`, as Parquet and, beside it, as CSV.

    Args:
        spec: as for `tables.aggregate_scores`, with "bundles" (each: name, how, and rows as the spec's own).
        summary_path: the summary of the rows' own models.

    Raises:
        TableError: a row's scores are missing or damaged.
    """
    thresholds = read_thresholds(spec)
    alone = {line["concept"]: line for line in pq.read_table(summary_path).to_pylist()}
    lines = [
        {
            "bundle": bundle["name"],
            "how": bundle["how"],
            **{f"{name}_alone": alone.get(row["concept"], {}).get(name) for name in ("verdict", "removed")},
            **summarise(row, read_scores(row["scores"]), thresholds),
        }
        for bundle in spec["bundles"]
        for row in bundle["rows"]
    ]
    columns = pa.schema([*LEADING.items(), *summary_schema()])
    write_table([pa.Table.from_pylist(lines, schema=columns)], out_path, columns)
    log.info("%d bundles, %d rows", len(spec["bundles"]), len(lines))


def read_bundles(path: str | Path | None) -> dict[str, list[dict]]:
    """The lines of the table by bundle; none without a table."""
    found: dict[str, list[dict]] = {}
    for line in pq.read_table(path).to_pylist() if path and Path(path).is_file() else ():
        found.setdefault(line["bundle"], []).append(line)
    return found


def bundle_text(lines: Sequence[Mapping]) -> str:
    """How a bundle came out, without a full stop: `38 of 40 removed; came back: fox, owl; neighbors lost: pizza (bread)`, or
    `40 of 40 removed; all neighbors and anchors kept`."""
    present = [line for line in lines if not line["removed"]]
    back = [line["concept"] for line in present if line["removed_alone"]]
    never = [line["concept"] for line in present if not line["removed_alone"]]
    hidden = [line["concept"] for line in lines if line["verdict"] == NOT_SHOWN]
    lost = [f"{line['concept']} ({line['worst_neighbor']})" for line in lines if line["kept"] is False]
    anchors = [f"{line['concept']} ({line['anchor']})" for line in lines if line["anchor_kept"] is False]
    text = f"{sum(line['removed'] for line in lines)} of {len(lines)} removed"
    for title, names in (
        ("came back", back),
        ("not removed alone either", never),
        ("rarely drawn by the base model", hidden),
        ("neighbors lost", lost),
        ("anchor lost", anchors),
    ):
        text += f"; {title}: {', '.join(names)}" if names else ""
    kept = all(line["kept"] and line["anchor_kept"] for line in lines)
    return f"{text}; all neighbors and anchors kept" if kept else text
