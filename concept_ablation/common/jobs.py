"""What every job does first."""

from __future__ import annotations

from concept_ablation.common.amx import avoid_hidden_tiles
from concept_ablation.common.gpu_locks import claim_device


def start_job(snakemake) -> None:
    """What every script does first, before torch is imported: oneDNN is kept from AMX where that fails, logs go to the rule's log, and a GPU job claims its device.

    `snakemake`: the object that Snakemake gives to a script. A job is a GPU job if its rule asks for `gpu` and the config
    doesn't keep it off CUDA.
    """
    from concept_ablation.common.logs import setup_logging, tell_end

    avoid_hidden_tiles()
    setup_logging(snakemake.log[0], results=snakemake.config["results"])
    tell_end(snakemake.log[0])
    resources = snakemake.resources
    if resources.get("gpu", 0) and resources.device in ("auto", "cuda"):
        claim_device(snakemake.config["runtime"]["gpu_jobs_per_device"])


def files_of(snakemake) -> dict[str, str | list[str]]:
    """A job's inputs, outputs and records by the names that its rule gives them; a name with no file is left out.

    A record is a file of the rule's `log` other than the log itself: it stays when the job fails.
    """
    named = [*snakemake.input.items(), *snakemake.output.items(), *snakemake.log.items()]
    files = {name: file if isinstance(file, str) else [str(one) for one in file] for name, file in named}
    return {
        name: str(file) if isinstance(file, str) else file
        for name, file in files.items()
        if file and name != "text"
    }
