"""Rule render_report: the page."""

import json

from concept_ablation.report import render
from concept_ablation.runtime import setup_logging

setup_logging(snakemake.log[0])
render(
    json.loads(snakemake.params.spec), snakemake.input.scores, snakemake.input.summary, snakemake.output[0]
)
