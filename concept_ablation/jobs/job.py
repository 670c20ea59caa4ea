"""What the script of every job calls: its start, and its stage's work."""

from __future__ import annotations

import json
from collections.abc import Mapping

from concept_ablation.common.amx import avoid_hidden_tiles
from concept_ablation.common.gpu_locks import claim_device
from concept_ablation.common.parts import MAIN, begin, timed
from concept_ablation.registries import STAGES


def start_job(snakemake) -> None:
    """Prepare a script that does its work itself. `snakemake`: the object that Snakemake gives to a script."""
    _prepare(_setting_of(snakemake))


def describe(snakemake) -> dict[str, object]:
    """A stage's job as plain values: the rule's `params.spec`, files and resources, and where it logs."""
    spec = json.loads(snakemake.params.spec)
    options = {name: snakemake.resources[name] for name in STAGES[spec["stage"]].options}
    return {**_setting_of(snakemake), "spec": spec, "files": files_of(snakemake), "options": options}


def run(job: Mapping) -> None:
    """Do the work of a stage's job, as `describe` gives it. Once a process, in its main thread."""
    _prepare(job)
    stage = job["spec"]["stage"]
    with timed("start-up"):
        work = STAGES[stage].run  # imports torch, unless the process is warm
    with timed(MAIN.get(stage, "rest")):
        work(job["spec"], **job["files"], **job["options"])


def _setting_of(snakemake) -> dict[str, object]:
    resources, gpu_jobs = snakemake.resources, None
    if resources.get("gpu", 0) and resources.device in ("auto", "cuda"):
        gpu_jobs = snakemake.config["runtime"]["gpu_jobs_per_device"]
    return {"log": str(snakemake.log[0]), "results": snakemake.config["results"], "gpu_jobs": gpu_jobs}


def _prepare(job: Mapping) -> None:
    """Before torch computes: keep oneDNN from unusable AMX, start the log, lock a GPU if the job may use one."""
    from concept_ablation.common.logs import raise_signals, setup_logging, tell_end

    begin()
    avoid_hidden_tiles()
    raise_signals()  # before the log's first line, or a signal right after it would leave a log that just ends
    setup_logging(job["log"], results=job["results"])
    tell_end(job["log"])
    if job["gpu_jobs"]:
        claim_device(job["gpu_jobs"])


def files_of(snakemake) -> dict[str, str | list[str]]:
    """A job's inputs, outputs and records by the names that its rule gives them. A name without a file is left out.

    A record is a file that the rule lists under `log` beside the log itself, so that it is kept when the job fails.
    """
    named = [*snakemake.input.items(), *snakemake.output.items(), *snakemake.log.items()]
    files = {name: file if isinstance(file, str) else [str(one) for one in file] for name, file in named}
    return {
        name: str(file) if isinstance(file, str) else file
        for name, file in files.items()
        if file and name != "text"
    }
