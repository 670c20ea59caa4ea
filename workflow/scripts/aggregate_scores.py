"""Rule aggregate_scores: the tables of all rows."""

import json
from pathlib import Path

from snakemake.script import snakemake

from concept_ablation.runtime import setup_logging
from concept_ablation.tables import aggregate

setup_logging(snakemake.log[0])
aggregate(json.loads(snakemake.params.spec), Path(snakemake.output.scores).parent)
