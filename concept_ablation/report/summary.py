"""The summary: a wide table with one row a concept, to be sorted and compared. docs/report.md explains its columns."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import damaged
from concept_ablation.common.roles import POOLS, WORST
from concept_ablation.common.run_id import run_id
from concept_ablation.common.versions import versions
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.report.comebacks import COLUMNS as ATTACKS
from concept_ablation.report.discoveries import CLAIMS
from concept_ablation.report.strength import COLUMNS as STRENGTH
from concept_ablation.report.strength import strength_columns
from concept_ablation.verdict import Thresholds, decide, presence_of


class RecordError(UserError):
    """A training record that can't be read; the message names it."""


PRESENCE = "presence"
"""Stands for the metric that decides for the row's kind, `Kind.measure`."""

ROLES = ("target", "anchor", "neighbor", "worst_neighbor")
LEADING = {"target": PRESENCE, "anchor": PRESENCE, "neighbor": "recognition"}
"""The metric that a role is judged by first: its columns stand before the role's others."""

LIMITS = {
    "neighbor_loss": "neighbor_recognition_limit",
    "worst_neighbor_loss": "worst_neighbor_typical_limit",
    "anchor_loss": "anchor_typical_limit",
}
"""A loss that the verdict limits -> the column of the least change that counts as kept, which is negative."""

MADE_WITH = {
    "base_model": "path",
    "base_revision": "revision",
    "base_fingerprint": "fingerprint",
}
"""The summary's columns of the base model -> their names in a report's spec."""

VERSIONS = ("concept_ablation", "torch", "diffusers")
"""The packages whose versions the summary has as columns, `version_<name>`; the tables' metadata have more."""

KEYS = ("row_key", "samples_key", "delta_key")
"""The summary's keys: of a row's scores, which stand for the row; of its pictures; and of its delta."""

COSTS = {
    "cost_seconds": pa.float64(),
    "cost_cpu_seconds": pa.float64(),
    "cost_own_seconds": pa.float64(),
    "cost_jobs": pa.int64(),
    "cost_jobs_ran": pa.int64(),
    "cost_jobs_unmeasured": pa.int64(),
}
"""The columns of what a row cost, see `costs.row_costs`."""

FORMS = {
    "change": (("_base", "base", True), ("_ablated", "ablated", True), ("_change", "difference", True)),
    "models": (("_base", "base", False), ("_ablated", "ablated", False)),
    "interval": (("", "ablated", True),),
    "value": (("", "ablated", False),),
}
"""`Metric.summary_form` -> the columns that it makes: end of the name, side in the long table, whether with its interval."""

COUNTED, IMAGES = ("target", "anchor", "neighbor"), "image_similarity"
"""The roles whose images the summary counts, and the metric that counts them: every image has it."""


class Column(NamedTuple):
    """A column of measured values: the place in the long table that it is taken from; interval: with `_low` and `_high`."""

    name: str
    role: str
    metric: str
    side: str
    interval: bool


def measured_columns() -> list[Column]:
    """The summary's columns of measured values in their order: all with a change, then the others, role by role."""
    entries = [("presence", "target", PRESENCE, "change"), ("anchor_presence", "anchor", PRESENCE, "change")]
    for name, metric in METRICS.items():
        entries += [(column, role, name, metric.summary_form) for role, column in metric.summary.items()]

    def place(entry: tuple[str, str, str, str]) -> tuple[bool, int, int, bool]:
        _, role, metric, form = entry
        return form != "change", ROLES.index(role), list(FORMS).index(form), metric != LEADING.get(role)

    return [
        Column(column + end, role, metric, side, interval)
        for column, role, metric, form in sorted(entries, key=place)
        for end, side, interval in FORMS[form]
    ]


def summarise(row: Mapping, scores: pa.Table, thresholds: Thresholds, judges_anchor: bool = True) -> dict:
    """One row of the summary, from one row's scores (long), its training record and its delta.

    judges_anchor: whether the anchor is to be kept; another row of a bundle may remove it, and then its change decides nothing.
    A role's columns hold the values of all its images: of the only target or of all targets pooled, of all neighbors pooled.
    """
    found = _by_place(row, scores)
    measure = KINDS[row["kind"]].measure
    summary = {name: row[name] for name in ("concept", "kind", "target", "anchor")}
    summary |= {"neighbors": list(row["neighbors"]), "measure": measure} | _keys(row)
    summary |= {limit: -getattr(thresholds, f"{loss}_max") for loss, limit in LIMITS.items()}
    for column in measured_columns():
        metric = measure if column.metric == PRESENCE else column.metric
        line = found.get((column.role, metric, column.side), {})
        summary[column.name] = line.get("value")
        if column.interval:
            summary |= {f"{column.name}_low": line.get("ci_low"), f"{column.name}_high": line.get("ci_high")}
    for role in COUNTED:
        summary[f"{role}_images"] = found.get((role, IMAGES, "ablated"), {}).get("n")
    summary["worst_neighbor"] = found.get(("worst_neighbor", "typical", "difference"), {}).get("probe")
    targets = presence_of(row, scores.to_pylist())
    judged = summary if judges_anchor else {name: summary[name] for name in summary if "anchor" not in name}
    return (
        summary
        | asdict(decide(row["kind"], targets, judged, thresholds))
        | _cost(row)
        | strength_columns(row)
    )


def made_with(spec: Mapping) -> dict:
    """The summary's columns that are the same in all lines: the base model, the run that made the table, and its versions."""
    model, installed = spec.get("model") or {}, versions()
    return (
        {column: model.get(name) for column, name in MADE_WITH.items()}
        | {"run": run_id()}
        | {f"version_{name}": installed[name] for name in VERSIONS}
    )


def _keys(row: Mapping) -> dict:
    return {name: row.get("keys", {}).get(name) for name in KEYS}


def training_record(row: Mapping) -> dict[str, list]:
    """The columns of a row's training record by name, each with one number a step. Empty without a record (an imported delta)."""
    path = row.get("training")
    try:
        return pq.read_table(path).to_pydict() if path and Path(path).is_file() else {}
    except (OSError, pa.ArrowException) as error:
        raise damaged(RecordError, path, f"a damaged record of training ({error})") from error


def _by_place(row: Mapping, scores: pa.Table) -> dict[tuple[str, str, str], dict]:
    """(role, metric, side) -> line, where a role of several subjects means all of them pooled."""
    pooled = {"neighbor": POOLS["neighbor"], "anchor": "anchor", "worst_neighbor": WORST}
    pooled["target"] = POOLS["target"] if len(row["targets"]) > 1 else "target"
    role_of = {place: role for role, place in pooled.items()}
    return {
        (role_of[line["role"]], line["metric"], line["side"]): line
        for line in scores.to_pylist()
        if line["role"] in role_of
    }


def _cost(row: Mapping) -> dict:
    """What the row cost: steps, seconds and memory of its training, size of its delta. None where not recorded."""
    record, delta = training_record(row), Path(row["delta"])
    memory = [value for value in record.get("peak_memory_bytes", []) if value is not None]
    return {
        "steps": len(record["step"]) if record else None,
        "training_seconds": float(sum(record["seconds"])) if "seconds" in record else None,
        "peak_memory_mb": max(memory) / 1e6 if memory else None,
        "delta_mb": delta.stat().st_size / 1e6 if delta.is_file() else None,
        "delta": str(row.get("delta_shown", row["delta"])),
    }


def summary_schema() -> pa.Schema:
    """The summary's columns, in order."""
    measured = [
        f"{column.name}{end}"
        for column in measured_columns()
        for end in (("", "_low", "_high") if column.interval else ("",))
    ]
    texts = ["verdict", "firmness", "measure", "deciding_target", "worst_neighbor"]
    flags = ["removed", "kept", "anchor_kept", *(f"{claim}_controlled" for claim in CLAIMS)]
    chances = [f"{claim}_p{end}" for claim in CLAIMS for end in ("", "_adjusted")]
    about = [*KEYS, *MADE_WITH, "run", *(f"version_{name}" for name in VERSIONS)]
    target = [*LIMITS.values(), "target_limit", *(f"target_excess{end}" for end in ("", "_low", "_high"))]
    cost = ["training_seconds", "peak_memory_mb", "delta_mb"]
    return pa.schema(
        [(name, pa.string()) for name in ("concept", "kind", "target", "anchor")]
        + [("neighbors", pa.list_(pa.string()))]
        + [(name, pa.string()) for name in texts]
        + [("victims", pa.list_(pa.string()))]
        + [(name, pa.bool_()) for name in flags]
        + [(name, pa.float64()) for name in [*chances, *target, *measured]]
        + [
            (name, pa.int64())
            for name in [*(f"{role}_images" for role in COUNTED), "victims_measured", "steps"]
        ]
        + [(name, pa.float64()) for name in cost]
        + list(STRENGTH.items())
        + list(ATTACKS.items())
        + list(COSTS.items())
        + [(name, pa.string()) for name in ("delta", *about)]
    )
