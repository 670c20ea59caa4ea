"""Rule score_concept: one row's scores."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.evaluation.scoring import score_concept

score_concept(
    json.loads(snakemake.params.spec),
    snakemake.input.samples,
    list(snakemake.input.base),
    snakemake.output[0],
    runtime={"device": snakemake.resources.device},
)
