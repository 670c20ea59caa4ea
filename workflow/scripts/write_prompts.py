"""Rule write_prompts: one anchor's prompts."""

import json

from concept_ablation.common.jobs import start_job

start_job(snakemake)

from concept_ablation.prompts.stage import write_prompts

asking = {name: snakemake.resources[name] for name in ("device", "attempts", "timeout")}
write_prompts(
    json.loads(snakemake.params.spec),
    snakemake.output[0],
    {**asking, "key_variable": snakemake.resources.key_variable or None},
)
