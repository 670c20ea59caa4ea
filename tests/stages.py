"""Run a whole plan in this process, one stage after the other: what Snakemake does, without its jobs."""

import json
from pathlib import Path

from concept_ablation.plan.graph import Plan


def run_plan(plan: Plan, *, device: str = "cpu", batch_size: int = 16) -> None:
    """Do all of the plan's work that isn't done, then write its two tables and the page."""
    from concept_ablation.diffusion.delta_import import import_delta_stage
    from concept_ablation.diffusion.stages import sample_ablated, sample_base
    from concept_ablation.evaluation.scoring import score_concept
    from concept_ablation.methods.ablation.anchors import generate_anchors
    from concept_ablation.methods.ablation.prompt_search import search_prompts
    from concept_ablation.methods.ablation.stage import ablate_concept
    from concept_ablation.prompts.stage import write_prompts
    from concept_ablation.report.page import render
    from concept_ablation.report.tables import aggregate_scores

    options = {"device": device, "batch_size": batch_size}
    for stage, specs in plan.specs.items():
        for key in specs:
            spec, out = json.loads(plan.spec(stage, key)), Path(plan.path(key))
            if out.exists():
                continue

            def source(name, stage=stage, key=key):
                return plan.upstream(stage, key, name)

            if stage == "write_prompts":
                write_prompts(spec, out)
            elif stage == "search_prompts":
                search_prompts(spec, out, out.with_suffix(".parquet"), **options)
            elif stage == "generate_anchors":
                generate_anchors(spec, source("prompts"), out, **options)
            elif stage == "ablate_concept":
                ablate_concept(spec, source("anchors"), out, out.with_name("training.parquet"), device=device)
            elif stage == "import_delta":
                import_delta_stage(spec, out)
            elif stage == "sample_base":
                sample_base(spec, out, **options)
            elif stage == "sample_ablated":
                sample_ablated(spec, source("delta"), out, **options)
            elif stage == "score_concept":
                score_concept(spec, source("samples"), source("base"), out, runtime={"device": device})
    report = Path(plan.results) / "report"
    tables = (report / "scores.parquet", report / "summary.parquet")
    aggregate_scores(json.loads(plan.report_spec()), *tables)
    render(json.loads(plan.report_spec()), *tables, report / "index.html")
