"""Rule search_prompts: the prompts that bring one memorized picture back, and those that don't."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.methods.ablation.prompt_search import search_prompts

search_prompts(
    json.loads(snakemake.params.spec),
    snakemake.output[0],
    snakemake.log.record,
    candidates_path=next(iter(snakemake.input), None),
    device=snakemake.resources.device,
    batch_size=snakemake.resources.sample_batch_size,
)
