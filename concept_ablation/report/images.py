"""The table of all pictures that a number of the report comes from: those of the probes and those that try to bring targets back.

docs/report.md explains the columns.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.attack_table import COLUMNS as ATTACKS
from concept_ablation.common.files import atomic_output, damaged
from concept_ablation.common.image_store import METADATA_KEY, open_store
from concept_ablation.registries import KINDS
from concept_ablation.report.tables import TableError, describe, read_part, report_rows

ATTACK = "attack"
"""The role of a picture whose prompt asks for a target in another way; its subject is the family."""


def aggregate_images(spec: Mapping, out_path: str | Path) -> None:
    """Writes all rows' records of their pictures to `out_path`, one Parquet file; a bundle's rows follow, with its name in `bundle`.

    After a row's record come its wordings' and its attacks' pictures. Raises TableError if a row's record is missing or damaged, StoreError.
    """
    models = [(None, row) for row in report_rows(spec)]
    models += [(bundle["name"], row) for bundle in spec.get("bundles", []) for row in bundle["rows"]]
    about, writer = {METADATA_KEY: json.dumps(describe(spec))}, None
    with atomic_output(out_path) as part, contextlib.ExitStack() as open_file:
        for bundle, row in models:
            table = read_part(row["images"], "records of pictures")
            tried = pa.Table.from_pylist(list(_attack_lines(row)), table.schema)
            table = pa.concat_tables([table, tried])
            table = table.add_column(0, "bundle", pa.array([bundle] * len(table), pa.string()))
            if writer is None:
                writer = open_file.enter_context(pq.ParquetWriter(part, table.schema.with_metadata(about)))
            elif table.schema.names != writer.schema.names:
                raise damaged(TableError, row["images"], "these columns are not this version's")
            writer.write_table(table.cast(writer.schema))
        if writer is None:  # no row is finished
            pq.write_table(pa.table({}).replace_schema_metadata(about), part)


def _attack_lines(row: Mapping) -> Iterator[dict]:
    """The record's lines of a row's wordings and attacks, in the order of their image stores. A picture has one metric: what decides for its kind."""
    measure = KINDS[row["kind"]].measure
    for files in row.get("attacks", ()):
        seen = {
            (side.removesuffix("_seen"), line["family"]): iter(line[side] or ())
            for line in read_part(files["scores"], "measurements of attacks", ATTACKS).to_pylist()
            for side in line
            if side.endswith("_seen")
        }
        for position, picture in enumerate(open_store(files["images"]).rows):
            side, family = picture["role"], picture["subject"]
            yield {
                **{name: row[name] for name in ("concept", "kind", "target")},
                "side": side,
                "role": ATTACK,
                "subject": family,
                **{name: picture[name] for name in ("prompt", "seed")},
                measure: next(seen.get((side, family), iter(())), None),
                "key": Path(files["images"]).name.removesuffix(".images.parquet"),
                "position": position,
            }
