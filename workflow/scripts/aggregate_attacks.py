"""Rule aggregate_attacks: the table of what brings removed concepts back."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.attacks import aggregate_attacks
from concept_ablation.report.tables import relocate_paths

spec = relocate_paths(json.loads(snakemake.params.spec), Path(snakemake.output.attacks).parents[1])
aggregate_attacks(spec, snakemake.output.attacks)
