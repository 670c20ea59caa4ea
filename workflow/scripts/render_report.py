"""Rule render_report: the page."""

import json
from pathlib import Path

from concept_ablation.jobs.job import start_job

start_job(snakemake)

from concept_ablation.report.page import render
from concept_ablation.report.tables import relocate_paths

spec = relocate_paths(json.loads(snakemake.params.spec), Path(snakemake.output[0]).parents[1])
tables = ("bundles", "interference", "attacks")
more = {f"{name}_path": next(iter(snakemake.input[name]), None) for name in tables}
render(
    spec,
    snakemake.input.scores,
    snakemake.input.summary,
    snakemake.output[0],
    costs_path=snakemake.input.costs,
    **more,
)
