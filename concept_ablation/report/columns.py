"""The types of the columns of all CSV files of a report, in one file beside them."""

import json
from pathlib import Path

from concept_ablation.common.files import atomic_output
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.report import costs, interference
from concept_ablation.report.bundles import bundles_schema
from concept_ablation.report.csv_table import dtypes
from concept_ablation.report.summary import summary_schema


def write_columns(path: str | Path) -> None:
    """Writes JSON: table -> column -> type as pandas names it, to be given to `pandas.read_csv` as `dtype`."""
    schemas = {
        "scores": COLUMNS,
        "summary": summary_schema(),
        "costs": costs.COLUMNS,
        "interference": interference.TABLE,
        "bundles": bundles_schema(),
    }
    text = json.dumps({name: dtypes(schema) for name, schema in schemas.items()}, indent=1)
    with atomic_output(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
