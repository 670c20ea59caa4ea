"""Rule write_prompts: one anchor's prompts."""

import json
import logging

from snakemake.script import snakemake

from concept_ablation.prompts import write_prompts

logging.basicConfig(filename=snakemake.log[0], level=logging.INFO, force=True)
write_prompts(json.loads(snakemake.params.spec), snakemake.output[0])
