"""Any rule whose work the plan names: its stage's function gets the spec, and the rule's files and options by name."""

import json

from concept_ablation.common.jobs import files_of, start_job
from concept_ablation.registries import STAGES

start_job(snakemake)
spec = json.loads(snakemake.params.spec)
stage = STAGES[spec["stage"]]
stage.run(spec, **files_of(snakemake), **{name: snakemake.resources[name] for name in stage.options})
