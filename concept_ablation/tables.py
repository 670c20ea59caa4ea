"""The report's tables: all scores (long), one row a concept (wide), and the verdict on each row.

The verdict is decided here and nowhere else, from thresholds in the config: see `judge`. docs/report.md explains
every column to a reader.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from concept_ablation.runtime import atomic_output

log = logging.getLogger(__name__)

UNITS = {
    "clip_accuracy": "share of images",
    "recognition": "share of images",
    "clip_cosine": "cosine",
    "clip_score_2_5": "2.5 max(cosine, 0)",
    "image_similarity": "cosine",
    "kid_x1000": "1e-3",
}
"""Every metric and its unit, in the order of the report."""

SHARES = ("clip_accuracy", "recognition")
POOLED = "neighbors"
"""Role (and probe name) of all neighbors' images taken together."""

COLUMNS = pa.schema(
    [
        (name, pa.string())
        for name in ("concept", "kind", "target", "anchor", "probe", "role", "model", "metric")
    ]
    + [("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n", pa.int64())]
    + [(name, pa.string()) for name in ("unit", "interval", "text", "against", "features", "key")]
)
"""The long table's columns."""

KEPT = "removed, neighbors kept"
HARMED = "removed, neighbors harmed"
ALONE = "removed, no neighbors measured"
PRESENT = "not removed"
TOO_WIDE = "inconclusive: interval too wide"
NOT_SHOWN = "inconclusive: the base model rarely shows the target"
VERDICTS = (KEPT, HARMED, ALONE, PRESENT, TOO_WIDE, NOT_SHOWN)

MEASURED = {
    "target_accuracy": ("target", "clip_accuracy"),
    "anchor_accuracy": ("anchor", "clip_accuracy"),
    "neighbor_recognition": (POOLED, "recognition"),
    "neighbor_accuracy": (POOLED, "clip_accuracy"),
}
"""Columns of the summary with an interval, each for the base model, the ablated one, and the change between them."""

MODELS = {"base": "base", "ablated": "ablated", "change": "difference"}
ROLES = {"target": "target", "anchor": "anchor", "neighbor": POOLED}


class TableError(ValueError):
    """A row's file is missing or has other columns; the message names it."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as removed and as kept. Shares of images, 0 to 1.

    target_max: an object is removed when at most this share of the target's images is still nearer to the target's text.
    style_margin: a style is removed at the share that neutral prompts give on the base model, plus this.
    neighbor_loss_max: neighbors are kept when their recognition falls by at most this.
    base_min: below this share on the base model there was nothing to remove.
    half_width_max: an interval wider than +- this, and holding the limit, decides nothing.
    """

    target_max: float = 0.20
    style_margin: float = 0.10
    neighbor_loss_max: float = 0.05
    base_min: float = 0.50
    half_width_max: float = 0.20


@dataclass(frozen=True)
class Verdict:
    """The verdict on one row, in words and in parts.

    removed, kept: whether the measured values are within the limits; kept is None without neighbors.
    settled: the intervals, too, lie wholly on the verdict's side; else more images could change it.
    target_limit: the share of images that counted as removed.
    """

    verdict: str
    removed: bool
    kept: bool | None
    settled: bool
    target_limit: float


def judge(kind: str, summary: Mapping, thresholds: Thresholds) -> Verdict:
    """The verdict on one row of the summary (its `MEASURED` columns).

    The measured values decide; the intervals say whether they may ("inconclusive") and how firmly (`settled`).
    """
    limit = target_limit(kind, summary["anchor_accuracy_base"], thresholds)
    removed = Decision.of(summary, "target_accuracy_ablated", limit)
    loss = None
    if summary.get("neighbor_recognition_change") is not None:
        loss = Decision.of(summary, "neighbor_recognition_change", -thresholds.neighbor_loss_max, "at least")
    decided = [removed] if loss is None or not removed.within else [removed, loss]
    settled = all(decision.settled for decision in decided)
    if summary["target_accuracy_base"] < thresholds.base_min:
        verdict, settled = NOT_SHOWN, False
    elif any(
        not decision.settled and decision.half_width > thresholds.half_width_max for decision in decided
    ):
        verdict = TOO_WIDE
    elif not removed.within:
        verdict = PRESENT
    elif loss is None:
        verdict = ALONE
    else:
        verdict = KEPT if loss.within else HARMED
    return Verdict(verdict, removed.within, None if loss is None else loss.within, settled, limit)


def target_limit(kind: str, neutral_share: float, thresholds: Thresholds) -> float:
    """The share of target images that counts as removed.

    A style can't fall below what prompts without any style give: the base model's own share under the anchor.
    """
    return neutral_share + thresholds.style_margin if kind == "style" else thresholds.target_max


@dataclass(frozen=True)
class Decision:
    """One measured value beside its limit."""

    within: bool
    settled: bool
    half_width: float

    @classmethod
    def of(
        cls, summary: Mapping, column: str, limit: float, side: Literal["at most", "at least"] = "at most"
    ) -> "Decision":
        value, low, high = (summary[column + end] for end in ("", "_low", "_high"))
        if side == "at least":
            value, low, high, limit = -value, -high, -low, -limit
        rounding = 1e-9  # a loss of exactly 5 points is "at most 5 points"
        within = value <= limit + rounding
        return cls(within, high <= limit + rounding if within else low > limit, (high - low) / 2)


def aggregate_scores(
    spec: Mapping | Sequence[Mapping], scores_path: str | Path, summary_path: str | Path
) -> None:
    """Writes all rows' scores (long) and the summary (wide), each as Parquet and, beside it, as CSV.

    Args:
        spec: the report's rows (concept, kind, target, anchor, neighbors, scores, samples, base, delta, training), or
            {"rows": rows, "verdict": thresholds}.
        scores_path, summary_path: the Parquet files; the CSV files get the same name with `.csv`.

    Raises:
        TableError: a row's file is missing or damaged. ValueError: an unknown threshold.
    """
    rows, thresholds = report_rows(spec), read_thresholds(spec)
    tables = [_read(row["scores"]) for row in rows]
    summary = [summarise(row, table, thresholds) for row, table in zip(rows, tables, strict=True)]
    write_table(pa.concat_tables([COLUMNS.empty_table(), *tables]), scores_path)
    write_table(pa.Table.from_pylist(summary, schema=SUMMARY), summary_path)
    log.info("%d concepts, %d scores", len(rows), sum(table.num_rows for table in tables))


def report_rows(spec: Mapping | Sequence[Mapping]) -> list[Mapping]:
    """The rows of a report's spec, sorted by concept."""
    rows = spec["rows"] if isinstance(spec, Mapping) else spec
    return sorted(rows, key=lambda row: row["concept"])


def read_thresholds(spec: Mapping | Sequence[Mapping]) -> Thresholds:
    """The thresholds in a report's spec, or the defaults. Raises ValueError for an unknown name."""
    given = dict(spec.get("verdict", {})) if isinstance(spec, Mapping) else {}
    known = [field.name for field in fields(Thresholds)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"verdict: unknown {', '.join(unknown)} (allowed: {', '.join(known)})")
    return Thresholds(**given)


def summarise(row: Mapping, scores: pa.Table, thresholds: Thresholds) -> dict:
    """One row of the summary, from one row's scores (long), its training record and its delta."""
    found = {(line["role"], line["metric"], line["model"]): line for line in scores.to_pylist()}
    summary = {name: row[name] for name in ("concept", "kind", "target", "anchor")} | {
        "neighbors": "; ".join(row["neighbors"])
    }
    for column, (role, metric) in MEASURED.items():
        for name, model in MODELS.items():
            summary |= _with_interval(f"{column}_{name}", found.get((role, metric, model)))
    for name, role in ROLES.items():
        for metric in ("clip_cosine", "clip_score_2_5"):
            for model in ("base", "ablated"):
                summary[f"{name}_{metric}_{model}"] = found.get((role, metric, model), {}).get("value")
        summary |= _with_interval(f"{name}_kid_x1000", found.get((role, "kid_x1000", "ablated")))
        summary[f"{name}_image_similarity"] = found.get((role, "image_similarity", "ablated"), {}).get(
            "value"
        )
        summary[f"{name}_images"] = found.get((role, "clip_cosine", "ablated"), {}).get("n")
    return summary | asdict(judge(row["kind"], summary, thresholds)) | _cost(row)


def write_table(table: pa.Table, path: str | Path) -> None:
    """Writes a table as Parquet and, beside it, as CSV, each whole or not at all."""
    with atomic_output(path) as part:
        pq.write_table(table, part)
    with atomic_output(Path(path).with_suffix(".csv")) as part:
        pa.csv.write_csv(table, part, pa.csv.WriteOptions(quoting_style="needed"))


def training_record(path: str | Path) -> dict[str, list]:
    """The columns of a training record, by name, a step a number; empty when there is none."""
    return pq.read_table(path).to_pydict() if Path(path).is_file() else {}


def _cost(row: Mapping) -> dict:
    """What the row cost: steps, seconds and memory of its training, size of its delta. None where not recorded."""
    record, delta = training_record(row["training"]), Path(row["delta"])
    memory = [value for value in record.get("peak_memory_bytes", []) if value is not None]
    return {
        "steps": len(record["step"]) if record else None,
        "training_seconds": float(sum(record["seconds"])) if "seconds" in record else None,
        "peak_memory_mb": max(memory) / 1e6 if memory else None,
        "delta_mb": delta.stat().st_size / 1e6 if delta.is_file() else None,
        "delta": str(row["delta"]),
    }


def _with_interval(name: str, line: Mapping | None) -> dict:
    line = line or {}
    return {name: line.get("value"), f"{name}_low": line.get("ci_low"), f"{name}_high": line.get("ci_high")}


def _read(path: str | Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(
            f"{path}: scores can't be read ({error}); delete the file to make them again"
        ) from error
    if table.schema.names != COLUMNS.names:
        raise TableError(f"{path}: these columns are not this version's; delete the file to make them again")
    return table.cast(COLUMNS)


def _summary_schema() -> pa.Schema:
    names = [
        f"{column}_{name}{end}" for column in MEASURED for name in MODELS for end in ("", "_low", "_high")
    ]
    images = []
    for name in ROLES:
        names += [
            f"{name}_{metric}_{model}"
            for metric in ("clip_cosine", "clip_score_2_5")
            for model in ("base", "ablated")
        ]
        names += [f"{name}_kid_x1000{end}" for end in ("", "_low", "_high")] + [f"{name}_image_similarity"]
        images.append(f"{name}_images")
    texts = ["concept", "kind", "target", "anchor", "neighbors", "verdict"]
    flags = ["removed", "kept", "settled"]
    cost = ["training_seconds", "peak_memory_mb", "delta_mb"]
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [(name, pa.bool_()) for name in flags]
        + [(name, pa.float64()) for name in ["target_limit", *names]]
        + [(name, pa.int64()) for name in [*images, "steps"]]
        + [(name, pa.float64()) for name in cost]
        + [("delta", pa.string())]
    )


SUMMARY = _summary_schema()
"""The summary's columns, in order."""
