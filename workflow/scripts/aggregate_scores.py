"""Rule aggregate_scores: the tables of all rows."""

import json

from concept_ablation.runtime import setup_logging
from concept_ablation.tables import aggregate_scores

setup_logging(snakemake.log[0])
aggregate_scores(json.loads(snakemake.params.spec), snakemake.output.scores, snakemake.output.summary)
