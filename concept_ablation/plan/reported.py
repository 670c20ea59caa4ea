"""What the report is told of a plan: which rows and bundles there are, and which files hold their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concept_ablation.plan.graph import Plan
    from concept_ablation.plan.rows import Bundle, Row


JOINT = ("share_prompts", "merge_deltas", "train_bundle", "repair_bundle")
"""Stages whose work is made from that of many rows: if each of these listed it all, a plan would grow with the square of its rows."""


def reported(plan: Plan, rows: Sequence[Row], bundles: Sequence[Bundle]) -> dict:
    """The report's spec, see `tables.aggregate_scores`: rows and bundles with their files, and the report's settings."""
    spec = {"rows": [reported_row(plan, row) for row in rows], **plan.report}
    if rows:  # a table has one base model
        spec["model"] = plan.specs["sample_ablated"][rows[0].samples]["model"]
    if bundles:
        spec["bundles"] = [_bundle(plan, bundle) for bundle in bundles]
    return spec


def reported_row(plan: Plan, row: Row) -> dict:
    """One row: its words and its files."""
    concept, measured = row.concept, {}
    if row.interference:
        victims = [{**vars(one), "base": plan.path(one.base)} for one in row.interference.victims]
        measured = {"interference": {**plan.interference_files(row), "victims": victims}}
    if row.attacks:
        measured["attacks"] = plan.attack_files(row)
    return measured | {
        "concept": concept.name,
        "kind": concept.kind,
        "target": concept.target,
        "targets": list(concept.targets),
        "anchor": concept.anchor,
        "neighbors": list(concept.neighbors),
        "paraphrases": plan.specs["score_concept"][row.scores].get("paraphrases", []),
        "image": concept.image,
        "scores": plan.path(row.scores),
        "images": plan.image_record(row),
        "samples": plan.path(row.samples),
        "base": {subject: plan.path(key) for subject, key in row.base.items()},
        "delta": plan.path(row.ablation),
        "training": plan.training_record(row),
        "strength": plan.training_record(row, "strength"),
        "confidence": plan.specs["score_concept"][row.scores]["statistics"]["confidence"],
        "jobs": _jobs(plan, row),
        "keys": {"row_key": row.scores, "samples_key": row.samples, "delta_key": row.ablation},
    }


def _jobs(plan: Plan, row: Row) -> list[str]:
    """`stage/key` of the work that a row is made from. Its victims' base pictures are other rows', and so is what JOINT work is made from."""
    found: dict[str, None] = {}

    def visit(key: str) -> None:
        for name in plan.sources(key) if plan.stages[key] not in JOINT else ():
            if name not in found:
                visit(name)
        found[key] = None

    visit(row.scores)
    keys = [*found, *(key for key in row.last if key not in found)]
    return [f"{plan.stages[key]}/{key}" for key in keys]


def _bundle(plan: Plan, bundle: Bundle) -> dict:
    keys = plan.needed(bundle.delta) | (plan.needed(bundle.general) if bundle.general else {})
    return {
        "name": bundle.name,
        "how": bundle.how,
        "rows": [reported_row(plan, row) for row in bundle.judged],
        "anchors_gone": dict(bundle.anchors_gone),
        "general": bundle.general and plan.path(bundle.general),
        "jobs": [f"{plan.stages[key]}/{key}" for key in keys],
    }
