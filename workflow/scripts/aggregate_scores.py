"""Rule aggregate_scores: the tables of all rows."""

import json

from concept_ablation.devices import start_job

start_job(snakemake)

from concept_ablation.tables import aggregate_scores

aggregate_scores(json.loads(snakemake.params.spec), snakemake.output.scores, snakemake.output.summary)
