"""Rule sample_base: one probe, drawn by the unchanged model."""

import json

from concept_ablation.runtime import setup_logging
from concept_ablation.sampling import sample_base

setup_logging(snakemake.log[0])
sample_base(
    json.loads(snakemake.params.spec),
    snakemake.output[0],
    device=snakemake.resources.device,
    batch_size=snakemake.resources.sample_batch_size,
)
