"""The table of who harms whom: what every row's model does to targets and neighbors of other rows.

docs/report.md defines each column. `victims` reads the table.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from concept_ablation.common.files import damaged
from concept_ablation.common.interference_table import COLUMNS, MEASURES
from concept_ablation.report.discoveries import LEVEL, adjust
from concept_ablation.report.tables import TableError, read_part, report_rows, write_table

log = logging.getLogger(__name__)

TABLE = pa.schema(
    [(name, pa.string()) for name in ("concept", "victim", "victim_kind", "role", "row")]
    + [
        ("rows", pa.int64()),
        ("probed", pa.bool_()),
        ("harmed", pa.bool_()),
        ("change", pa.float64()),
        ("n", pa.int64()),
    ]
    + [field for field in COLUMNS if field.name not in ("victim", "n")]
    + [("p_adjusted", pa.float64()), ("images", pa.string())]
)
"""The columns of all rows' table."""


def aggregate_interference(spec: Mapping, out_path: str | Path) -> None:
    """Writes a line for each row and victim to `out_path`, as Parquet and, beside it, as CSV.

    Args:
        spec: as for `tables.aggregate_scores`; rows have "interference" where something is measured: scores, images, and victims,
            in the order of the lines of `scores`: subject, kind, role, row, rows, probed.

    Raises:
        TableError: a row's table is missing or damaged.
    """
    lines = [line for row in report_rows(spec) if row.get("interference") for line in _lines(row)]
    for line, adjusted in zip(lines, adjust([line["p"] for line in lines]), strict=True):
        line |= {"p_adjusted": adjusted, "harmed": adjusted <= LEVEL}
    write_table([pa.Table.from_pylist(lines, schema=TABLE)], out_path, TABLE)
    log.info("%d pairs, %d harmed", len(lines), sum(line["harmed"] for line in lines))


def _lines(row: Mapping) -> Iterator[dict]:
    measured = row["interference"]
    found = read_part(measured["scores"], "measurements of other rows' subjects", COLUMNS).to_pylist()
    if len(found) != len(measured["victims"]):
        raise damaged(TableError, measured["scores"], "other victims than planned")
    for victim, line in zip(measured["victims"], found, strict=True):
        yield line | {
            "concept": row["concept"],
            "victim_kind": victim["kind"],
            "role": victim["role"],
            "row": victim["row"],
            "rows": victim["rows"],
            "probed": victim["probed"] is not None,
            "change": min(line[f"{name}_change"] for name in MEASURES),
            "images": str(row["samples"] if victim["probed"] else measured["images"]),
        }
