"""The report's tables: all scores (long) and, made of them, one row a concept (wide, see `summary`).

docs/report.md explains every column to a reader. Each Parquet file says in its metadata, under `concept_ablation`, how many
rows it has and which are missing because they aren't finished; a whole run leaves the same beside them, as a mark.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation import __version__
from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output, damaged
from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.common.run_id import run_id
from concept_ablation.common.score_table import COLUMNS, LATER
from concept_ablation.common.versions import versions
from concept_ablation.report import csv_table
from concept_ablation.report.comebacks import attack_columns, read_attacks
from concept_ablation.report.discoveries import claim_columns, claim_p
from concept_ablation.report.summary import made_with, summarise, summary_schema
from concept_ablation.report.victims import read_interference, victim_columns
from concept_ablation.verdict import read_thresholds

log = logging.getLogger(__name__)
LINES = 20_000  # of the long table, in memory at once

FILES = ("scores", "images", "samples", "base", "delta", "training", "strength", "interference", "attacks")
"""The entries of a report's row that name files."""


class TableError(UserError):
    """A row's file is missing or has other columns; the message names it."""


def aggregate_scores(
    spec: Mapping,
    scores_path: str | Path,
    summary_path: str | Path,
    interference_path: str | Path | None = None,
    costs: Mapping[str, Mapping] | None = None,
    attacks_path: str | Path | None = None,
) -> None:
    """Writes all rows' scores (long) and the summary (wide), each as Parquet and, beside it, as CSV.

    Args:
        spec: "rows" (each: concept, kind, targets, target, anchor, neighbors, scores, samples, base, delta, and where they
            exist training, image), "verdict" (all thresholds), and perhaps "missing", the names of unfinished rows.
        scores_path, summary_path: the Parquet files; the CSV files get the same name with `.csv`.
        costs: what each row cost, as `costs.row_costs` gives it.
        interference_path: the table that `interference.aggregate_interference` wrote, if there is one.
        attacks_path: the table that `attacks.aggregate_attacks` wrote, if there is one.

    Raises:
        TableError: a row's file is missing or damaged. ValueError: an unknown or missing threshold.
    """
    rows, thresholds, summary, claims = report_rows(spec), read_thresholds(spec), [], []
    measured, tried = read_interference(interference_path), read_attacks(attacks_path)

    def read_all() -> Iterator[pa.Table]:
        for row in rows:
            table = read_scores(row["scores"])
            own = summarise(row, table, thresholds) | victim_columns(measured.get(row["concept"]))
            own |= attack_columns(tried.get(row["concept"]))
            claims.append(claim_p(row, table.to_pylist(), own["verdict"], thresholds))
            summary.append(own | made_with(spec) | (costs or {}).get(row["concept"], {}))
            yield table

    about = {METADATA_KEY: json.dumps(describe(spec))}
    scores = write_table(read_all(), scores_path, COLUMNS.with_metadata(about))
    summary = [line | more for line, more in zip(summary, claim_columns(claims), strict=True)]
    columns = summary_schema()
    wide = pa.Table.from_pylist(summary, schema=columns)
    write_table([wide], summary_path, columns.with_metadata(about))
    log.info("%d concepts, %d scores", len(rows), scores)


def describe(spec: Mapping) -> dict:
    """What a report's tables say of themselves: the number of rows, the names of unfinished ones, the base model, the run that made them
    and the versions of what it ran with."""
    return {
        "rows": len(spec["rows"]),
        "missing": list(spec.get("missing", [])),
        "model": spec.get("model"),
        "run": run_id(),
        "version": __version__,
        "versions": versions(),
    }


def mark_complete(spec: Mapping, path: str | Path) -> None:
    """Write the mark of a whole report, the JSON of `describe`. It is written last, after all tables."""
    with atomic_output(path) as part:
        part.write_text(json.dumps(describe(spec)) + "\n", encoding="utf-8")


def missing_rows(table: pa.Table) -> list[str]:
    """The names of the rows that a table of the report lacks because they weren't finished when it was made."""
    return json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}")).get("missing", [])


def report_rows(spec: Mapping) -> list[Mapping]:
    """The rows of a report's spec, sorted by concept."""
    return sorted(spec["rows"], key=lambda row: row["concept"])


def relocate_paths(spec: Mapping, results: str | Path) -> dict:
    """A report's spec with the rows' files below `results`, where a job finds them: under a storage plugin in local copies.

    A row's `delta_shown` is the delta's path as it was, which a reader of the tables knows.
    """

    def move(value: object, old: str) -> object:
        if isinstance(value, Mapping):
            return {name: move(part, old) for name, part in value.items()}
        if isinstance(value, list):
            return [move(part, old) for part in value]
        return (
            f"{results}{value[len(old) :]}"
            if isinstance(value, str) and value.startswith(old + "/")
            else value
        )

    def moved(row: Mapping) -> dict:
        old = str(Path(row["scores"]).parents[1])
        files = {name: move(row[name], old) for name in FILES if row.get(name) is not None}
        return {**row, **files, "delta_shown": row["delta"]}

    found = {**spec, "rows": [moved(row) for row in spec["rows"]]}
    if "bundles" in spec:
        found["bundles"] = [
            {
                **bundle,
                "rows": [moved(row) for row in bundle["rows"]],
                "general": move(bundle.get("general"), str(Path(bundle["rows"][0]["scores"]).parents[1])),
            }
            for bundle in spec["bundles"]
        ]
    return found


def write_table(tables: Iterable[pa.Table], path: str | Path, schema: pa.Schema) -> int:
    """Write tables one after the other into one Parquet file and a CSV file beside it; returns the number of lines.

    Each file is there whole or not at all.
    """
    count = 0
    with (
        atomic_output(path) as parquet,
        atomic_output(Path(path).with_suffix(".csv")) as text,
        pq.ParquetWriter(parquet, schema) as wide,
        text.open("wb") as flat,
    ):
        flat.write(csv_table.header(schema))
        for batch in _batches(tables):
            wide.write_table(batch)
            flat.write(csv_table.lines(batch))
            count += batch.num_rows
    return count


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables, put together until they have LINES lines."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= LINES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def read_scores(path: str | Path) -> pa.Table:
    """The long table of one row. Raises TableError."""
    table = read_part(path, "scores")
    for name in LATER:
        if name not in table.schema.names:
            table = table.append_column(COLUMNS.field(name), pa.nulls(len(table), pa.int64()))
    if table.schema.names != COLUMNS.names:
        raise damaged(TableError, path, "these columns are not this version's")
    return table.cast(COLUMNS)


def read_part(path: str | Path, what: str, columns: pa.Schema | None = None) -> pa.Table:
    """One row's table of which the report is made, with the names of `columns` if these are given.

    what: what it holds, in the plural, for messages. Raises TableError if it is missing, damaged, or of another version.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise TableError(f"{path}: there are no such {what}; run again") from None
    except (OSError, pa.ArrowException) as error:
        raise damaged(TableError, path, f"{what} can't be read ({error})") from error
    if columns is not None and table.schema.names != columns.names:
        raise damaged(TableError, path, "these columns are not this version's")
    return table
