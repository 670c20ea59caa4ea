"""The record of a row's pictures: a line a picture with what every metric says of it, so that each score can be traced.

docs/report.md explains the columns. A metric of single pictures has a column of its name; `kid_x1000` compares sets and has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import atomic_output
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.registries import METRICS

SIDES = ("base", "ablated")


def record_columns() -> pa.Schema:
    """The columns: what the picture is, its metrics, the nearest of the row's texts, where the picture is."""
    names = ("concept", "kind", "target", "side", "role", "subject", "prompt")
    metrics = [name for name, metric in METRICS.items() if metric.per_image]
    return pa.schema(
        [(name, pa.string()) for name in names]
        + [("seed", pa.int64())]
        + [(name, pa.float64()) for name in metrics]
        + [("nearest_text", pa.string()), ("key", pa.string()), ("position", pa.int64())]
    )


def record_lines(row: Row, keys: Mapping[str, str], samples_key: str) -> Iterator[dict]:
    """A line for each picture of each probe, without the row's names: first those of the base model, then the ablated one's.

    keys: subject -> the key of the base model's pictures. samples_key: of the ablated model's. A probe that doesn't know its images'
    positions there has them after those of the probes before it.
    """
    start = 0
    for probe in row.probes:
        values = _values(probe, row)
        for side, key, first in (("base", keys[probe.subject], 0), ("ablated", samples_key, start)):
            nearest = _nearest(getattr(probe, side), row.texts)
            places = (
                probe.positions
                if side == "ablated" and probe.positions
                else range(first, first + len(probe.base))
            )
            for number, position in enumerate(places):
                yield {
                    "side": side,
                    "role": probe.role,
                    "subject": probe.subject,
                    "prompt": probe.prompts[number] if probe.prompts else None,
                    "seed": probe.seeds[number] if probe.seeds else None,
                    **{
                        name: None if found is None else float(found[number])
                        for name, found in values[side].items()
                    },
                    "nearest_text": nearest[number],
                    "key": key,
                    "position": position,
                }
        start += len(probe.ablated)


def write_record(path: str | Path, lines: Sequence[Mapping]) -> None:
    """Write a row's lines, each complete, as Parquet."""
    with atomic_output(path) as part:
        pq.write_table(pa.Table.from_pylist(list(lines), record_columns()), part)


def _values(probe: Probe, row: Row) -> dict[str, dict[str, np.ndarray | None]]:
    """Side -> metric -> (n,) numbers, of the metrics that this probe has; base is None for a metric of pairs."""
    found: dict[str, dict[str, np.ndarray | None]] = {side: {} for side in SIDES}
    for name, metric in METRICS.items():
        if metric.per_image and metric.applies(row.kind) and probe.role in metric.roles:
            values = metric.values(probe, row)
            for side in SIDES if values is not None else ():
                found[side][name] = getattr(values, side)
    return found


def _nearest(features: np.ndarray, texts: Mapping[str, np.ndarray]) -> list[str]:
    """The subject whose text is nearest to each image, of all the row's."""
    names, vectors = list(texts), np.stack(list(texts.values()))
    return [names[number] for number in (features @ vectors.T).argmax(axis=1)]
