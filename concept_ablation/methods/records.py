"""What every method writes beside its delta: what was removed from which model, and a line a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import METADATA_KEY

FIELDS = ("kind", "targets", "anchor", "neighbors", "anchors", "method", "seed", "stage", "version")


def describe(spec: Mapping) -> dict[str, object]:
    """A delta's metadata as far as its spec tells them: the base model, and what was removed from it."""
    model = spec["model"]
    return {
        "base_model": model["path"],
        "base_revision": model["revision"],
        "base_fingerprint": model.get("fingerprint"),
        "base_config": model.get("config"),
        **{name: spec[name] for name in FIELDS if name in spec},
    }


def write_records(
    path: str | Path, records: Sequence[Mapping[str, object]], metadata: Mapping[str, object]
) -> None:
    """Write one line a step (none for a method without steps) to a Parquet file, `metadata` as JSON in it."""
    table = pa.Table.from_pylist(list(records))
    with atomic_output(path) as part:
        pq.write_table(
            table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)}), part
        )
