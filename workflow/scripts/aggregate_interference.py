"""Rule aggregate_interference: the table of who harms whom."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.interference import aggregate_interference
from concept_ablation.report.tables import relocate_paths

spec = relocate_paths(json.loads(snakemake.params.spec), Path(snakemake.output.interference).parents[1])
aggregate_interference(spec, snakemake.output.interference)
