"""Rule aggregate_bundles: the table of all judged bundles."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.bundles import aggregate_bundles
from concept_ablation.report.tables import relocate_paths

spec = relocate_paths(json.loads(snakemake.params.spec), Path(snakemake.output.bundles).parents[1])
aggregate_bundles(spec, snakemake.input.summary, snakemake.output.bundles)
