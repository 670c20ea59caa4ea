"""What the script of every job calls: its start, and its files by name."""

from __future__ import annotations

from concept_ablation.common.amx import avoid_hidden_tiles
from concept_ablation.common.gpu_locks import claim_device


def start_job(snakemake) -> None:
    """Prepare the process, before torch is imported: keep oneDNN from unusable AMX, start the log, lock a GPU.

    `snakemake`: the object that Snakemake gives to a script. A GPU is locked if the rule asks for `gpu` and the
    config's device is `auto` or `cuda`.
    """
    from concept_ablation.common.logs import setup_logging, tell_end

    avoid_hidden_tiles()
    setup_logging(snakemake.log[0], results=snakemake.config["results"])
    tell_end(snakemake.log[0])
    resources = snakemake.resources
    if resources.get("gpu", 0) and resources.device in ("auto", "cuda"):
        claim_device(snakemake.config["runtime"]["gpu_jobs_per_device"])


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
