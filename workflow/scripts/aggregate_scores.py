"""Rule aggregate_scores: the tables of all rows."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.tables import aggregate_images, aggregate_scores, mark_complete, relocate_paths

spec = relocate_paths(json.loads(snakemake.params.spec), Path(snakemake.output.scores).parents[1])
interference = next(iter(snakemake.input.interference), None)
attacks = next(iter(snakemake.input.attacks), None)
aggregate_scores(spec, snakemake.output.scores, snakemake.output.summary, interference, attacks)
aggregate_images(spec, snakemake.output.images)
mark_complete(spec, snakemake.output.complete)
