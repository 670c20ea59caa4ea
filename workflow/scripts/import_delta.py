"""Rule import_delta: one delta made elsewhere."""

import json

from concept_ablation.formats import import_delta_stage as import_delta
from concept_ablation.runtime import setup_logging

setup_logging(snakemake.log[0])
import_delta(json.loads(snakemake.params.spec), snakemake.output[0])
