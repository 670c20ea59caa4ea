# What all rules share: the checked config, the checked table, the plan made of both, and what is said before and after a run.
import sys
from pathlib import Path

from concept_ablation.checks import check_rows
from concept_ablation.concepts import ConceptsError
from concept_ablation.handover import hand_over, handed_plan, take_back
from concept_ablation.plan import PlanError
from concept_ablation.specs import load_plan
from concept_ablation.validation import ConfigError


def read_plan(config, schemas, configfiles):
    """The plan of all rows; one message lists whatever is wrong with the config or the table, and nothing runs.

    A job on another machine gets the plan of its run, whatever the table and the config say by now.
    """
    handed = None if workflow.is_main_process else handed_plan()
    if handed:
        config.update(handed.config)
        return handed
    try:
        checked, plan = load_plan(config, schemas, ", ".join(str(file) for file in configfiles))
        config.update(checked)
        if workflow.is_main_process:  # a job has nothing to say about the table
            warnings = check_rows(plan, plan.pending, config["concepts"])
            if warnings:
                logger.warning(warnings)
        return plan
    except (ConceptsError, ConfigError, PlanError) as error:
        sys.exit(f"\n{error}")


def print_report(plan):
    """Tell how each row came out and where the report is, if this run made it."""
    folder = Path(plan.results) / "report"
    if (folder / "index.html").exists():
        from concept_ablation.report import print_summary

        print_summary(folder / "summary.parquet", folder / "index.html")


plan = read_plan(config, Path(workflow.basedir) / "workflow" / "schemas", workflow.configfiles)


pathvars:
    results=config["results"],
    logs=f"{config['results']}/logs",
    benchmarks=f"{config['results']}/benchmarks",


wildcard_constraints:
    key=r"[A-Za-z0-9-]+\.[0-9a-f]{12}",


onstart:
    if not workflow.local_exec:
        hand_over(plan, config, Path(".snakemake") / "plans")
    logger.info(plan.summary())


onsuccess:
    take_back()
    print_report(plan)


onerror:
    take_back()
    logger.error(
        f"Some jobs failed. Each one's log is in {plan.results}/logs/<rule>/<key>.log; finished work is kept."
    )
