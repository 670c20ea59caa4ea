# What all rules share: the checked config and table, the plan made of them, and the messages before and after a run.
import atexit
import gc
import sys
from pathlib import Path

import yaml

from concept_ablation.common.errors import UserError
from concept_ablation.common.run_id import start_run
from concept_ablation.common.settings import merge
from concept_ablation.jobs import warm
from concept_ablation.jobs.once_a_rule import do_once_a_rule
from concept_ablation.plan.checks import check_report, check_rows
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.snapshot import delete_snapshot, load_snapshot, save_snapshot
from concept_ablation.plan.specs import load_plan
from concept_ablation.registries import STAGES
from concept_ablation.report.failures import set_empty_aside

# This project's checkout, also if another workflow uses it as a module.
ROOT = Path(workflow.current_basedir).parents[1]


def read_plan(config, configfiles):
    """The plan of all rows. One message lists all mistakes in the config or the table, and nothing runs.

    A job on another machine takes its run's plan, so that edits made meanwhile don't reach it.
    """
    snapshot = None if workflow.is_main_process else load_snapshot()
    if snapshot:
        config.update(snapshot.config)
        return snapshot
    defaults, files = ROOT / "config" / "config.yaml", [str(file) for file in configfiles]
    # Used as a module, `config` replaces the file, so its keys are laid over the defaults here.
    if str(defaults) not in files:
        complete = yaml.safe_load(defaults.read_text(encoding="utf-8"))
        merge(complete, config)
        config.update(complete)
        files = ["config of the module"]
    try:
        if workflow.is_main_process:
            for file in configfiles:
                read_config(file)  # Snakemake has read it, but doesn't notice repeated keys
        checked, plan = load_plan(config, ROOT / "workflow" / "schemas", ", ".join(files))
        config.update(checked)
        if workflow.is_main_process:  # the run has already warned, its jobs needn't
            for file in set_empty_aside(plan):
                logger.warning(f"{file} was empty: it is set aside as .damaged and made anew")
            for warnings in (check_rows(plan, plan.pending, checked, most=5), check_report(plan)):
                if warnings:
                    logger.warning(warnings)
        return plan
    except UserError as error:
        sys.exit(f"\n{error}")


def file_of(stage, name):
    """The path of a stage's output `name`, with `{key}` in it, as `registries.STAGES` lists it."""
    return f"<results>/{STAGES[stage].files[name]}"


def start_warm(plan, workflow):
    """Start the process that imports torch once for all jobs, where it can serve them: see concept_ablation/jobs/warm.py."""
    runtime, elsewhere = config["runtime"], workflow.deployment_settings.deployment_method
    here = workflow.local_exec and not elsewhere and warm.serves(runtime["device"])
    if runtime["warm_start"] and here and plan.goals():
        try:
            warm.start(runtime["threads"], Path(".snakemake") / "warm_start.log")
        except OSError as error:
            logger.warning(f"Jobs can't start warm, so each takes some seconds more: {error}")


def show_run(plan, logs):
    """Show the run in the terminal, if there is one, in the place of Snakemake's lines."""
    from concept_ablation.report import terminal  # here, since every job on another machine reads this file

    terminal.show(plan, logger, logs)


def end_show():
    """Let Snakemake's lines come again."""
    from concept_ablation.report import terminal

    terminal.end()


def print_report(plan):
    """Print each row's verdict and where the report is, if it is on this machine."""
    folder = Path(plan.results) / "report"
    if (folder / "summary.parquet").exists():
        from concept_ablation.report.console import print_summary

        bundles = folder / "bundles.parquet" if plan.judges_bundles else None
        harm = folder / "interference.parquet" if plan.measures_interference else None
        attacks = folder / "attacks.parquet" if plan.attacks_rows else None
        tables = {"bundles_path": bundles, "interference_path": harm, "attacks_path": attacks}
        print_summary(folder / "summary.parquet", folder / "index.html", **tables)


def print_failures(plan, scheduler):
    """Make the report of the finished rows, and print which jobs failed or were ended, and why.

    With a remote storage no report is made, since the finished files are not on this machine.
    """
    from concept_ablation.plan.cleanup import locked_since
    from concept_ablation.report.failures import failure_text, find_failures, report_unfinished

    # Jobs that still count as running were ended by Ctrl-C together with the run. After SIGTERM Snakemake waits for its jobs.
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


# Collect garbage seldom, and not at the end: searching a graph of many jobs takes a sixth of the planning time each and finds nothing.
gc.set_threshold(10_000_000, 50, 100)
atexit.register(gc.freeze)
do_once_a_rule()
plan = read_plan(config, workflow.configfiles)
# Here and not in `onstart`, so that a dry run says it, too, and a run with nothing to do.
if workflow.is_main_process:
    logger.info(plan.summary())
# Whether results are in a remote storage.
stored = workflow.storage_settings.default_storage_provider is not None
# Rule `all` asks for these files, too: a report that another checkout made must not hide unfinished rows. In a remote storage
# all rows count as unfinished, so only their smallest files, the scores, are asked for, and the bundles' deltas.
unfinished = plan.small_files() if stored else plan.goals()
# Of these, what measures rows on other rows' concepts; and the table made of it, which there is only if anything is measured.
measured = {file for file in unfinished if file.startswith(f"{plan.results}/interference/")}
interference = ["<results>/report/interference.parquet"] if plan.measures_interference else []
# The same for what tries to bring targets back.
attacked = {
    file for file in unfinished if file.startswith((f"{plan.results}/wordings/", f"{plan.results}/attacks/"))
}
attacks = ["<results>/report/attacks.parquet"] if plan.attacks_rows else []
# What the report's tables are made of beside these.
judged = [file for file in unfinished if file not in measured and file not in attacked]


pathvars:
    results=config["results"],
    logs=f"{config['results']}/logs",
    benchmarks=f"{config['results']}/benchmarks",


wildcard_constraints:
    key=r"[A-Za-z0-9-]+\.[0-9a-f]{12}",


onstart:
    if not workflow.local_exec:
        save_snapshot(plan, config, Path(".snakemake") / "plans")
    start_run()
    show_run(plan, log)
    start_warm(plan, workflow)


onsuccess:
    warm.stop()
    end_show()
    delete_snapshot()
    print_report(plan)


onerror:
    warm.stop()
    end_show()
    delete_snapshot()
    print_failures(plan, workflow.scheduler)
