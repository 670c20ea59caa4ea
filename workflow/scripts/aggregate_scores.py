"""Rule aggregate_scores: the tables of all rows."""

import json
from pathlib import Path

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.report.tables import aggregate_scores, at_hand, mark_complete

spec = at_hand(json.loads(snakemake.params.spec), Path(snakemake.output.scores).parents[1])
aggregate_scores(spec, snakemake.output.scores, snakemake.output.summary)
mark_complete(spec, snakemake.output.complete)
