"""Rule render_report: the page."""

import json

from concept_ablation.devices import start_job

start_job(snakemake)

from concept_ablation.report import render

render(
    json.loads(snakemake.params.spec), snakemake.input.scores, snakemake.input.summary, snakemake.output[0]
)
