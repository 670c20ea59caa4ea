"""Rule aggregate_scores: the tables of all rows."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.columns import write_columns
from concept_ablation.report.costs import aggregate_costs, row_costs
from concept_ablation.report.images import aggregate_images
from concept_ablation.report.tables import aggregate_scores, mark_complete, relocate_paths

results = Path(snakemake.output.scores).parents[1]
spec = relocate_paths(json.loads(snakemake.params.spec), results)
costs = row_costs(aggregate_costs(spec, results, snakemake.output.costs))
interference = next(iter(snakemake.input.interference), None)
attacks = next(iter(snakemake.input.attacks), None)
aggregate_scores(spec, snakemake.output.scores, snakemake.output.summary, interference, costs, attacks)
aggregate_images(spec, snakemake.output.images)
write_columns(snakemake.output.columns)
mark_complete(spec, snakemake.output.complete)
