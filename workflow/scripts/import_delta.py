"""Rule import_delta: one delta made elsewhere."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.diffusion.delta_import import import_delta_stage as import_delta

import_delta(json.loads(snakemake.params.spec), snakemake.output[0])
