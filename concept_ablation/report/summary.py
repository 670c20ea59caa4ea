"""One row a concept: the wide table that a person sorts by. docs/report.md explains its columns."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import damaged
from concept_ablation.common.roles import POOLS, WORST
from concept_ablation.registries import KINDS
from concept_ablation.report.verdict import Presence, Thresholds, judge


class RecordError(UserError):
    """A training record that can't be read; the message names it."""


PRESENCE = "presence"
"""Stands for the metric that decides for the row's kind, `Kind.measure`."""

MEASURED = {
    "presence": ("target", PRESENCE),
    "target_accuracy": ("target", "clip_accuracy"),
    "target_content": ("target", "content"),
    "target_typical": ("target", "typical"),
    "anchor_presence": ("anchor", PRESENCE),
    "anchor_accuracy": ("anchor", "clip_accuracy"),
    "anchor_content": ("anchor", "content"),
    "anchor_typical": ("anchor", "typical"),
    "neighbor_recognition": ("neighbor", "recognition"),
    "neighbor_accuracy": ("neighbor", "clip_accuracy"),
    "neighbor_typical": ("neighbor", "typical"),
    "worst_neighbor_typical": ("worst_neighbor", "typical"),
}
"""Columns with an interval, each for the base model, the ablated one, and the change between them: their role and metric."""

MODELS = {"base": "base", "ablated": "ablated", "change": "difference"}
ROLES = ("target", "anchor", "neighbor")


def summarise(row: Mapping, scores: pa.Table, thresholds: Thresholds) -> dict:
    """One row of the summary, from one row's scores (long), its training record and its delta.

    A role's columns hold the values of all its images: of the only target or of all targets pooled, of all neighbors pooled.
    """
    found = _by_place(row, scores)
    measure = KINDS[row["kind"]].measure
    summary = {name: row[name] for name in ("concept", "kind", "target", "anchor")}
    summary |= {"neighbors": "; ".join(row["neighbors"]), "measure": measure}
    for column, (role, metric) in MEASURED.items():
        metric = measure if metric == PRESENCE else metric
        for name, model in MODELS.items():
            summary |= _with_interval(f"{column}_{name}", found.get((role, metric, model)))
    for role in ROLES:
        for metric in ("clip_cosine", "clip_score_2_5"):
            for model in ("base", "ablated"):
                summary[f"{role}_{metric}_{model}"] = found.get((role, metric, model), {}).get("value")
        summary |= _with_interval(f"{role}_kid_x1000", found.get((role, "kid_x1000", "ablated")))
        likeness = found.get((role, "image_similarity", "ablated"), {})
        summary |= {f"{role}_image_similarity": likeness.get("value"), f"{role}_images": likeness.get("n")}
    summary["worst_neighbor"] = found.get(("worst_neighbor", "typical", "difference"), {}).get("probe")
    targets = read_presence(row, scores)
    return summary | asdict(judge(row["kind"], targets, summary, thresholds)) | _cost(row)


def read_presence(row: Mapping, scores: pa.Table) -> list[Presence]:
    """Each target of a row, with the share of its images in which it is still there."""
    lines = {
        (line["probe"], line["metric"], line["model"]): line
        for line in scores.to_pylist()
        if line["role"] == "target"
    }
    measure, targets = KINDS[row["kind"]].measure, []
    for target in row["targets"]:
        before, after = (lines[target, measure, model] for model in ("base", "ablated"))
        neutral = lines.get((target, "neutral_share", "base"), {}).get("value")
        above = lines.get((target, "above_neutral", "ablated"))
        above = above and (above["value"], above["ci_low"], above["ci_high"])
        interval = after["ci_low"], after["ci_high"]
        targets.append(Presence(target, before["value"], after["value"], *interval, neutral, above))
    return targets


def training_record(row: Mapping) -> dict[str, list]:
    """The columns of a row's training record, by name, a step a number; empty when there is none (an imported delta)."""
    path = row.get("training")
    try:
        return pq.read_table(path).to_pydict() if path and Path(path).is_file() else {}
    except (OSError, pa.ArrowException) as error:
        raise damaged(RecordError, path, f"a damaged record of training ({error})") from error


def _by_place(row: Mapping, scores: pa.Table) -> dict[tuple[str, str, str], dict]:
    """(role, metric, model) -> line, where a role of several subjects means all of them pooled."""
    pooled = {"neighbor": POOLS["neighbor"], "anchor": "anchor", "worst_neighbor": WORST}
    pooled["target"] = POOLS["target"] if len(row["targets"]) > 1 else "target"
    role_of = {place: role for role, place in pooled.items()}
    return {
        (role_of[line["role"]], line["metric"], line["model"]): line
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


def _with_interval(name: str, line: Mapping | None) -> dict:
    line = line or {}
    return {name: line.get("value"), f"{name}_low": line.get("ci_low"), f"{name}_high": line.get("ci_high")}


def _schema() -> pa.Schema:
    names = [
        f"{column}_{name}{end}" for column in MEASURED for name in MODELS for end in ("", "_low", "_high")
    ]
    for role in ROLES:
        names += [
            f"{role}_{metric}_{model}"
            for metric in ("clip_cosine", "clip_score_2_5")
            for model in ("base", "ablated")
        ]
        names += [f"{role}_kid_x1000{end}" for end in ("", "_low", "_high")] + [f"{role}_image_similarity"]
    texts = ["concept", "kind", "target", "anchor", "neighbors", "verdict", "firmness", "measure"]
    texts += ["deciding_target", "worst_neighbor"]
    flags = ["removed", "kept", "anchor_kept"]
    target = ["target_limit", *(f"target_excess{end}" for end in ("", "_low", "_high"))]
    cost = ["training_seconds", "peak_memory_mb", "delta_mb"]
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [(name, pa.bool_()) for name in flags]
        + [(name, pa.float64()) for name in [*target, *names]]
        + [(name, pa.int64()) for name in [*(f"{role}_images" for role in ROLES), "steps"]]
        + [(name, pa.float64()) for name in cost]
        + [("delta", pa.string())]
    )


SUMMARY = _schema()
"""The summary's columns, in order."""
