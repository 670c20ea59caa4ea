"""Rule score_concept: one row's scores."""

import json

from concept_ablation.runtime import setup_logging
from concept_ablation.scoring import score_concept

setup_logging(snakemake.log[0])
score_concept(
    json.loads(snakemake.params.spec),
    snakemake.input.samples,
    list(snakemake.input.base),
    snakemake.output[0],
    runtime={"device": snakemake.resources.device},
)
