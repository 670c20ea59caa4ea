"""Rule ablate_concept: remove one concept."""

import json

from concept_ablation.runtime import setup_logging
from concept_ablation.training import ablate_concept

setup_logging(snakemake.log[0])
ablate_concept(
    json.loads(snakemake.params.spec),
    snakemake.input.anchors,
    snakemake.output.delta,
    snakemake.output.training,
    device=snakemake.resources.device,
)
