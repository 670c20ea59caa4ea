"""Read a table and check its rows' prompts with the linter.

The workflow checks unfinished rows whenever it is planned. `python -m concept_ablation check` (`make check`) checks
all rows.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.common.settings import merge
from concept_ablation.plan.graph import Plan, PlanError, Row
from concept_ablation.plan.lint import LintRow, format_findings, lint_rows
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.prompts.templates import expand, read_templates, subsample_evenly
from concept_ablation.prompts.tokenizer import TokenizerError, load_tokens, tokenizer_folder
from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS, method_of

ROOT = Path(__file__).parents[2]  # the checkout


def check_table(configfiles: Sequence[str]) -> str:
    """Check the config, the table and every row's prompts; nothing is run. Returns the warnings and the number of rows.

    `configfiles` are overlays of `config/config.yaml`, as for `snakemake --configfile`. Raises ConfigError,
    ConceptsError, PlanError.
    """
    config, plan = read_table(configfiles)
    warnings = check_rows(plan, plan.rows, config).splitlines()
    return "\n".join(
        [*warnings, f"{config['concepts']}: {len(plan.rows)} rows read, {len(warnings)} warnings"]
    )


def read_table(configfiles: Sequence[str], disabled: bool = False) -> tuple[dict, Plan]:
    """The checked config, with the overlays `configfiles`, and the plan of its table. See `specs.load_plan`."""
    config = read_config(ROOT / "config" / "config.yaml")
    for file in configfiles:
        merge(config, read_config(file))
    source = ", ".join(["config/config.yaml", *configfiles])
    return load_plan(config, ROOT / "workflow" / "schemas", source, disabled)


def check_rows(plan: Plan, rows: Sequence[Row], config: Mapping, most: int | None = None) -> str:
    """The linter's warnings about `rows` of the plan, one a line; empty if there are none. most: see `format_findings`.

    Raises PlanError if a row's prompts make its training useless.
    """
    if not rows:
        return ""
    table, tokens, warnings = config["concepts"], None, []
    try:
        tokens = load_tokens(tokenizer_folder(config["model"]))
    except TokenizerError as error:
        warnings.append(
            f"model: without its tokenizer, too long prompts and unknown words can't be found: {error}"
        )
    findings = lint_rows([_lint_row(plan, row) for row in rows], tokens)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise PlanError(
            f"{table}: {len(errors)} row(s) whose prompts can't work\n{format_findings(errors, table)}"
        )
    return "\n".join([*warnings, *([format_findings(findings, table, most)] if findings else [])])


def check_report(plan: Plan) -> str:
    """A warning if the report in the results folder has other rows than the plan: another table shares the folder."""
    path = Path(plan.results, "report", "summary.csv")
    if plan.pending or not path.is_file() or not path.with_name("complete.json").exists():
        return ""  # without complete.json the report is made again anyway
    with path.open(encoding="utf-8", newline="") as file:
        made = {line[0] for line in list(csv.reader(file))[1:] if line}
    if made == {row.concept.name for row in plan.rows}:
        return ""
    return (
        f"{path.parent}: holds the report of another table, which uses the same results folder. If nothing else is to be "
        "done, make it again: snakemake --cores all --forcerun aggregate_scores"
    )


def _lint_row(plan: Plan, row: Row) -> LintRow:
    """A row's prompts as far as the plan knows them. Those of a search or a language model are not known yet."""
    concept = row.concept
    anchors: list[str] = []
    targets: list[tuple[str, ...]] = []
    work = plan.specs["ablate_concept"].get(row.ablation)
    source = plan.specs["write_prompts"].get(
        row.anchors and plan.specs["generate_anchors"][row.anchors]["prompts"]
    )
    if source and "file" in source["source"]:
        templates = read_templates(source["source"]["file"])
        anchors = subsample_evenly(expand(templates, concept.anchor, source["slots"]), source["count"])
        kind, method = KINDS[concept.kind], method_of(work)
        words = (concept.targets, concept.anchor, method.templates(work))
        targets = [tuple(dict.fromkeys(made)) for made in kind.target_prompts(anchors, *words)]
        if kind.needs_anchor_word:  # training leaves prompts without the anchor out; the linter counts them
            targets = [
                made if has_word(prompt, concept.anchor) else ()
                for prompt, made in zip(anchors, targets, strict=True)
            ]
    return LintRow(
        concept.line,
        concept.name,
        concept.kind,
        concept.targets,
        concept.anchor,
        concept.neighbors,
        anchors,
        targets,
        {probe["subject"]: probe["prompts"] for probe in plan.specs["sample_ablated"][row.samples]["probes"]},
    )
