"""Rule sample_ablated: all probes of a row, drawn by the ablated model."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.diffusion.stages import sample_ablated

sample_ablated(
    json.loads(snakemake.params.spec),
    snakemake.input.delta,
    snakemake.output[0],
    device=snakemake.resources.device,
    batch_size=snakemake.resources.sample_batch_size,
)
