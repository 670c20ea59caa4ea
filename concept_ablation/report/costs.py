"""What every job cost, and what of it falls to each row: from Snakemake's benchmarks, the jobs' logs and what the results say of themselves.

Nothing is measured here. docs/report.md explains the columns. A job that serves several rows is divided equally among them, so that
the rows' shares add up to the whole; a bundle pays only for what no row needs.
"""

import csv
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.common.logs import read_took
from concept_ablation.common.run_id import run_began
from concept_ablation.registries import STAGES
from concept_ablation.report.summary import COSTS
from concept_ablation.report.tables import describe, write_table

log = logging.getLogger(__name__)

COLUMNS = pa.schema(
    [
        ("stage", pa.string()),
        ("key", pa.string()),
        ("rows", pa.list_(pa.string())),
        ("bundles", pa.list_(pa.string())),
        ("ran", pa.bool_()),
        ("finished", pa.string()),
        ("seconds", pa.float64()),
        ("cpu_seconds", pa.float64()),
        ("peak_memory_mb", pa.float64()),
        ("device", pa.string()),
        ("pictures", pa.int64()),
        ("sampler_steps", pa.int64()),
        ("training_steps", pa.int64()),
    ]
)
"""A line a job."""


class Measured(NamedTuple):
    """What a job's benchmark and log say; None where neither does. ended: when, in seconds since 1970."""

    ended: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_mb: float | None = None


def aggregate_costs(spec: Mapping, results: str | Path, out_path: str | Path) -> list[dict]:
    """Writes a line a job to `out_path`, as Parquet and, beside it, as CSV; returns the lines.

    Args:
        spec: as for `tables.aggregate_scores`; rows, and those of bundles, have "jobs": `stage/key` of all that they were made from.
        results: the folder with `benchmarks` and `logs`. A job without them (done elsewhere) has no times.
    """
    served: dict[
        str, tuple[dict, dict]
    ] = {}  # a job -> the rows and the bundles that need it, as ordered sets
    for row in spec["rows"]:
        for job in row.get("jobs", ()):
            served.setdefault(job, ({}, {}))[0][row["concept"]] = None
    for bundle in spec.get("bundles", ()):
        for job in [*bundle.get("jobs", ()), *(job for row in bundle["rows"] for job in row.get("jobs", ()))]:
            served.setdefault(job, ({}, {}))[1][bundle["name"]] = None
    order, began = {stage: place for place, stage in enumerate(STAGES)}, run_began()
    jobs = sorted(served, key=lambda job: (order[job.partition("/")[0]], job))
    lines = [_line(job, *map(list, served[job]), Path(results), began) for job in jobs]
    about = {METADATA_KEY: json.dumps(describe(spec) | {"total": total(lines)})}
    write_table([pa.Table.from_pylist(lines, schema=COLUMNS)], out_path, COLUMNS.with_metadata(about))
    log.info("%d jobs", len(lines))
    return lines


def total(lines: Sequence[Mapping]) -> dict:
    """All jobs together: their number, how many ran in this run (None: not known) or lack a measurement, seconds and CPU seconds."""
    ran = [line["ran"] for line in lines if line["ran"] is not None]
    return {
        "jobs": len(lines),
        "ran": sum(ran) if ran else None,
        "unmeasured": sum(line["seconds"] is None for line in lines),
        **{name: sum(line[name] or 0.0 for line in lines) for name in ("seconds", "cpu_seconds")},
    }


def stage_costs(lines: Iterable[Mapping]) -> dict[str, dict]:
    """`total` of each stage's jobs, in the order of the stages, with the most memory and the number of pictures."""
    found: dict[str, list[Mapping]] = {}
    for line in lines:
        found.setdefault(line["stage"], []).append(line)
    return {
        stage: total(own)
        | {"memory": max((line["peak_memory_mb"] or 0.0 for line in own), default=0.0)}
        | {"pictures": sum(line["pictures"] or 0 for line in own)}
        for stage, own in found.items()
    }


def row_costs(lines: Iterable[Mapping]) -> dict[str, dict]:
    """`summary.COSTS` of each row, by its name.

    cost_seconds, cost_cpu_seconds: of its jobs, each divided by the number of rows that it serves. cost_own_seconds: of those that serve
    no other row. cost_jobs: their number; of them _ran in this run, and _unmeasured without a benchmark.
    """
    found: dict[str, dict] = {}
    for line in lines:
        for row in line["rows"]:
            own = found.setdefault(row, {name: 0 for name in COSTS})
            for name in ("seconds", "cpu_seconds"):
                own[f"cost_{name}"] += (line[name] or 0.0) / len(line["rows"])
            own["cost_own_seconds"] += (line["seconds"] or 0.0) if len(line["rows"]) == 1 else 0.0
            own["cost_jobs"] += 1
            own["cost_jobs_ran"] += bool(line["ran"])
            own["cost_jobs_unmeasured"] += line["seconds"] is None
    return found


def read_costs_table(path: str | Path | None) -> list[dict]:
    """The lines of the table that `aggregate_costs` wrote; none without one."""
    return pq.read_table(path).to_pylist() if path and Path(path).is_file() else []


def _line(job: str, rows: list[str], bundles: list[str], results: Path, began: float | None) -> dict:
    stage, _, key = job.partition("/")
    found = _measured(results, stage, key)
    known = found.ended is not None and began is not None
    return {
        "stage": stage,
        "key": key,
        "rows": rows,
        "bundles": bundles,
        "ran": found.ended >= began if known else None,
        "finished": None
        if found.ended is None
        else f"{datetime.fromtimestamp(found.ended, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peak_memory_mb": found.peak_memory_mb,
        **_made(results, stage, key),
    }


def _measured(results: Path, stage: str, key: str) -> Measured:
    """The benchmark of a job, with the log's CPU time and memory: a job that starts warm only waits in the process that is measured."""
    file = results / "benchmarks" / stage / f"{key}.tsv"
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            line = list(csv.DictReader(opened, delimiter="\t"))[-1]
        ended, seconds = file.stat().st_mtime, float(line["s"])
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return Measured()
    told = read_took(results / "logs" / stage / f"{key}.log")
    return Measured(ended, seconds, *(told or (_number(line.get("cpu_time")), _number(line.get("max_rss")))))


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # "-" and "NA" where psutil saw nothing
        return None


def _made(results: Path, stage: str, key: str) -> dict:
    """What a job's own tables say: where it ran, how many pictures it drew, with how many steps each, and how long it trained."""
    made = dict.fromkeys(("device", "pictures", "sampler_steps", "training_steps"))
    for name, file in STAGES[stage].files.items():
        if not file.endswith(".parquet"):
            continue
        try:
            found = pq.ParquetFile(results / file.format(key=key))
            about = json.loads((found.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
            if "image" in found.schema_arrow.names:
                made["pictures"] = (made["pictures"] or 0) + found.metadata.num_rows
                made["sampler_steps"] = (about.get("sampler") or {}).get("steps")
            if name == "training":
                made["training_steps"] = found.metadata.num_rows
            elif "pictures" in found.schema_arrow.names:  # looks at validation pictures
                looked = found.read(["pictures"])["pictures"].to_pylist()
                made["pictures"] = (made["pictures"] or 0) + sum(number or 0 for number in looked)
            made["device"] = made["device"] or about.get("device")
        except (OSError, pa.ArrowException, ValueError):
            continue  # the row's own tables complain of what is damaged
    return made
