"""A run whose jobs start warm writes what each job's work writes in a process of its own."""

import shutil
from pathlib import Path

from safetensors import safe_open

from tests.workflow.conftest import CAT, HEADER

RUN = ("--cores", "2", "--configfile", "small.yaml")


def read(file: Path) -> object:
    """What is in a file. The library writes a delta's metadata in no certain order."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "numpy") as tensors:
        names = sorted(tensors.keys())
        return tensors.metadata(), [(name, tensors.get_tensor(name).tobytes()) for name in names]


def test_warm_jobs_write_the_same_files(make_checkout):
    checkout = make_checkout()
    checkout.write(HEADER + CAT)
    done = checkout.snakemake(*RUN)
    assert done.returncode == 0, done.stdout
    warm, own = checkout.folder / "warm", checkout.folder / "results"
    shutil.move(own, warm)
    assert (checkout.folder / ".snakemake" / "warm_start.log").read_bytes() == b""
    (log,) = (warm / "logs" / "score_concept").glob("*.log")
    assert "CPU s, and" in log.read_text().splitlines()[-2]
    checkout.prepare(HEADER + CAT, but=())
    files = [
        file.relative_to(own)
        for folder in ("prompts", "anchors", "base", "samples", "scores", "concepts")
        for file in (own / folder).rglob("*.*")
        if file.is_file() and file.name not in ("training.parquet", "strength.parquet")  # these have seconds
    ]
    assert len(files) >= 7
    assert [] == [str(file) for file in files if read(own / file) != read(warm / file)]


def test_warm_start_can_be_switched_off(make_checkout):
    checkout = make_checkout()
    checkout.write(HEADER + CAT)
    until = ("--until", "write_prompts", "--config", "runtime={warm_start: false}")
    done = checkout.snakemake(*RUN, *until)
    assert done.returncode == 0, done.stdout
    assert not (checkout.folder / ".snakemake" / "warm_start.log").exists()
