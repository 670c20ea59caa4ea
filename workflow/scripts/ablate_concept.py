"""Rule ablate_concept: remove one concept."""

import json
from pathlib import Path

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.methods.ablation.stage import ablate_concept

# Beside the outputs, but no output: what Snakemake would remove when the job is killed.
results, key = Path(snakemake.output.delta).parents[2], snakemake.wildcards.key
ablate_concept(
    json.loads(snakemake.params.spec),
    snakemake.input.anchors,
    snakemake.output.delta,
    snakemake.output.training,
    device=snakemake.resources.device,
    checkpoint_path=results / "checkpoints" / f"{key}.pt",
    checkpoint_steps=snakemake.resources.checkpoint_steps,
)
