"""Rule generate_anchors: one anchor's pictures."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.methods.ablation.anchors import generate_anchors

generate_anchors(
    json.loads(snakemake.params.spec),
    snakemake.input.prompts,
    snakemake.output[0],
    device=snakemake.resources.device,
    batch_size=snakemake.resources.sample_batch_size,
)
