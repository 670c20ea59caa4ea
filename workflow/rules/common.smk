# What all rules share: the checked config, the checked table, the plan made of both, and what is said before and after a run.
import gc
import sys
from pathlib import Path

import yaml

from concept_ablation.plan.checks import check_report, check_rows
from concept_ablation.plan.table import ConceptsError
from concept_ablation.report.failures import set_empty_aside
from concept_ablation.plan.snapshot import save_snapshot, load_snapshot, delete_snapshot
from concept_ablation.plan.graph import PlanError
from concept_ablation.common.settings import merge
from concept_ablation.registries import STAGES
from concept_ablation.plan.specs import load_plan
from concept_ablation.plan.schema import ConfigError, read_config

# The checkout, also when another workflow uses this one as a module.
ROOT = Path(workflow.current_basedir).parents[1]


def read_plan(config, configfiles):
    """The plan of all rows; one message lists whatever is wrong with the config or the table, and nothing runs.

    A job on another machine gets the plan of its run, whatever the table and the config say by now.
    """
    snapshot = None if workflow.is_main_process else load_snapshot()
    if snapshot:
        config.update(snapshot.config)
        return snapshot
    defaults, files = ROOT / "config" / "config.yaml", [str(file) for file in configfiles]
    # A module's `config:` stands in for the file; here too its keys are an overlay.
    if str(defaults) not in files:
        complete = yaml.safe_load(defaults.read_text(encoding="utf-8"))
        merge(complete, config)
        config.update(complete)
        files = ["config of the module"]
    try:
        if workflow.is_main_process:
            for file in configfiles:
                read_config(file)  # Snakemake has read it; this also finds keys that stand twice
        checked, plan = load_plan(config, ROOT / "workflow" / "schemas", ", ".join(files))
        config.update(checked)
        if workflow.is_main_process:  # a job has nothing to say about the table
            for file in set_empty_aside(plan):
                logger.warning(f"{file} was empty: set aside as .damaged, to be made anew")
            for warnings in (check_rows(plan, plan.pending, checked), check_report(plan)):
                if warnings:
                    logger.warning(warnings)
        return plan
    except (ConceptsError, ConfigError, PlanError) as error:
        sys.exit(f"\n{error}")


def file_of(stage, name):
    """The output of a stage that is called `name`, with `{key}` in it; `registries.STAGES` lists them."""
    return f"<results>/{STAGES[stage].files[name]}"


def print_report(plan):
    """Tell how each row came out and where the report is, if there is one here."""
    folder = Path(plan.results) / "report"
    if (folder / "summary.parquet").exists():
        from concept_ablation.report.page import print_summary

        print_summary(folder / "summary.parquet", folder / "index.html")


def print_failures(plan, scheduler):
    """Make the report of what is finished, and tell which jobs failed or were ended, and why.

    Of a remote storage there is no report: what is finished is not here.
    """
    from concept_ablation.plan.cleanup import locked_since
    from concept_ablation.report.failures import failure_text, find_failures, report_unfinished

    # What still counts as running was ended by Ctrl-C, together with the run; after SIGTERM Snakemake waits for its jobs.
    stopped = bool(scheduler.running or scheduler._user_kill or not scheduler.failed)
    jobs = [job for job in scheduler.failed | scheduler.running if job.log]
    jobs = [(job.rule.name, job.wildcards_dict.get("key"), str(job.log[0])) for job in jobs]
    failures = find_failures(plan, jobs, stopped, locked_since("."))
    try:
        if not stored:
            logger.info("Making the report of what is finished (Ctrl-C leaves it out)")
            failures = report_unfinished(plan, failures)
    except KeyboardInterrupt:
        logger.error("The report of what is finished was left out.")
    except (OSError, ValueError) as error:
        logger.error(f"The report of what is finished can't be made: {error}")
    said = f"{failure_text(failures)}\n\n" if failures else ""
    end = "Stopped. What" if stopped else "What"
    logger.error(f"\n{said}{end} is finished is kept: run the same command again for the rest.")


# A graph of many jobs is no garbage: searching it for some is a sixth of the planning.
gc.set_threshold(100_000, 50, 100)
plan = read_plan(config, workflow.configfiles)
stored = workflow.storage_settings.default_storage_provider is not None  # results are in a remote storage
# Targets too, since a report that another checkout made is no reason to leave a row out. Of a remote storage all rows count
# as unfinished, so that only their smallest files are.
unfinished = [file for file in plan.pending_files() if "/scores/" in file] if stored else plan.goals()


pathvars:
    results=config["results"],
    logs=f"{config['results']}/logs",
    benchmarks=f"{config['results']}/benchmarks",


wildcard_constraints:
    key=r"[A-Za-z0-9-]+\.[0-9a-f]{12}",


onstart:
    if not workflow.local_exec:
        save_snapshot(plan, config, Path(".snakemake") / "plans")
    logger.info(plan.summary())


onsuccess:
    delete_snapshot()
    print_report(plan)


onerror:
    delete_snapshot()
    print_failures(plan, workflow.scheduler)
