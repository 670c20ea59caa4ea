"""Run a whole plan in this process, one stage after the other: what Snakemake does, without its jobs."""

import json
from collections.abc import Collection
from pathlib import Path

from concept_ablation.plan.graph import Plan
from concept_ablation.registries import STAGES

INPUTS = {
    "search_prompts": {"candidates": "candidates_from"},
    "generate_anchors": {"prompts": "prompts"},
    "ablate_concept": {"anchors": "anchors", "shared": "shared"},
    "merge_deltas": {"deltas": "deltas", "prompts": "prompts"},
    "share_prompts": {"anchors": "prompts"},
    "train_bundle": {"anchors": "anchors", "prompts": "prompts"},
    "repair_bundle": {"source": "source", "anchors": "anchors", "prompts": "prompts"},
    "score_general": {"samples": "samples", "base": "base", "other": "other"},
    "sample_ablated": {"delta": "delta", "base": "base"},
    "score_concept": {"samples": "samples", "base": "base"},
    "measure_interference": {"delta": "delta", "base": "base", "samples": "samples"},
    "probe_wordings": {"delta": "delta", "pictures": "pictures", "control": "control"},
    "attack_concept": {"delta": "delta", "pictures": "pictures", "control": "control"},
}
"""The rules' inputs: their name -> that in the spec."""


def run_plan(plan: Plan, *, device: str = "cpu", batch_size: int = 16) -> None:
    """Do all of the plan's work that isn't done, then write its two tables and the page."""
    from concept_ablation.report.attacks import aggregate_attacks
    from concept_ablation.report.bundles import aggregate_bundles
    from concept_ablation.report.costs import aggregate_costs, row_costs
    from concept_ablation.report.images import aggregate_images
    from concept_ablation.report.interference import aggregate_interference
    from concept_ablation.report.page import render
    from concept_ablation.report.tables import aggregate_scores

    run_stages(plan, device=device, batch_size=batch_size)
    report = Path(plan.results) / "report"
    tables = (report / "scores.parquet", report / "summary.parquet")
    interference = report / "interference.parquet" if plan.measures_interference else None
    if interference:
        aggregate_interference(json.loads(plan.report_spec()), interference)
    attacks = report / "attacks.parquet" if plan.attacks_rows else None
    if attacks:
        aggregate_attacks(json.loads(plan.report_spec()), attacks)
    costs = aggregate_costs(json.loads(plan.report_spec()), plan.results, report / "costs.parquet")
    aggregate_scores(json.loads(plan.report_spec()), *tables, interference, row_costs(costs), attacks)
    aggregate_images(json.loads(plan.report_spec()), report / "images.parquet")
    bundles = report / "bundles.parquet" if plan.judges_bundles else None
    if bundles:
        aggregate_bundles(json.loads(plan.report_spec()), tables[1], bundles)
    more = {"bundles_path": bundles, "interference_path": interference, "attacks_path": attacks}
    render(json.loads(plan.report_spec()), *tables, report / "index.html", **more)


def run_stages(plan: Plan, but: Collection[str] = (), *, device: str = "cpu", batch_size: int = 16) -> None:
    """Do the plan's work that isn't done, without the stages `but` and what needs them; no report."""
    for name, stage in STAGES.items():
        given = {"device": device, "batch_size": batch_size}
        options = {option: given[option] for option in stage.options if option in given}
        for key in plan.specs[name] if name not in but else ():
            outputs = {file: Path(plan.results) / path.format(key=key) for file, path in stage.files.items()}
            if next(iter(outputs.values())).exists():
                continue
            sources = {file: plan.upstream(name, key, own) for file, own in INPUTS.get(name, {}).items()}
            inputs = {file: source for file, source in sources.items() if source}
            needed = [
                one for source in inputs.values() for one in ([source] if isinstance(source, str) else source)
            ]
            if all(Path(file).exists() for file in needed):
                stage.run(json.loads(plan.spec(name, key)), **inputs, **outputs, **options)
