"""Rule sample_base: one probe, drawn by the unchanged model."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.diffusion.stages import sample_base

sample_base(
    json.loads(snakemake.params.spec),
    snakemake.output[0],
    device=snakemake.resources.device,
    batch_size=snakemake.resources.sample_batch_size,
)
