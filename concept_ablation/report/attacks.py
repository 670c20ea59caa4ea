"""The table of what brings removed concepts back: every row's families of wordings and its attack, beside the verdict's limit.

docs/report.md defines each column. `comebacks` reads the table.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from concept_ablation.common.attack_table import COLUMNS
from concept_ablation.common.decision import Decision
from concept_ablation.report.tables import read_part, read_scores, report_rows, write_table
from concept_ablation.verdict import Thresholds, presence_of, read_thresholds, target_limit

log = logging.getLogger(__name__)

TABLE = pa.schema(
    [(name, pa.string()) for name in ("concept", "kind", "target", "family")]
    + [("back", pa.bool_()), ("firm", pa.bool_()), ("shown", pa.bool_()), ("limit", pa.float64())]
    + [field for field in COLUMNS if field.name != "family" and not pa.types.is_list(field.type)]
    + [("images", pa.string())]
)
"""The columns of all rows' table."""


def aggregate_attacks(spec: Mapping, out_path: str | Path) -> None:
    """Writes a line for each row and family to `out_path`, as Parquet and, beside it, as CSV.

    Args:
        spec: as for `tables.aggregate_scores`; rows have "attacks", a list of groups with the files `scores` and `images`.

    Raises:
        TableError: a row's table is missing or damaged. ValueError: an unknown or missing threshold.
    """
    thresholds = read_thresholds(spec)
    lines = [line for row in report_rows(spec) if row.get("attacks") for line in _lines(row, thresholds)]
    write_table([pa.Table.from_pylist(lines, schema=TABLE)], out_path, TABLE)
    log.info("%d families, %d bring their target back", len(lines), sum(line["back"] for line in lines))


def _lines(row: Mapping, thresholds: Thresholds) -> Iterator[dict]:
    """A row's lines. Of several targets with limits of their own the largest counts: a picture may show any of them."""
    targets = presence_of(row, read_scores(row["scores"]).to_pylist())
    limit = max(target_limit(row["kind"], target.neutral, thresholds) for target in targets)
    names = {name: row[name] for name in ("concept", "kind", "target")}
    for files in row["attacks"]:
        for line in read_part(files["scores"], "measurements of attacks", COLUMNS).to_pylist():
            found = (line["ablated"], line["ablated_low"], line["ablated_high"])
            decision = Decision.of(*found, limit, "at most")
            yield (
                names
                | {name: line[name] for name in line if not name.endswith("_seen")}
                | {
                    "limit": limit,
                    "back": not decision.within,
                    "firm": decision.settled,
                    "shown": line["base"] >= thresholds.base_min,
                    "images": files["images"],
                }
            )
