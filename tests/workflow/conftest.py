"""A checkout of its own for tests that start Snakemake: the workflow's files, tiny models, a small config."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from concept_ablation.common.settings import merge
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from tests.leftovers import end, processes_of
from tests.stages import run_stages

ROOT = Path(__file__).parents[2]
HEADER = "concept,kind,target,anchor,neighbors,steps\n"
CAT = "cat,object,pouting cat,cat,weary cat,\n"
INK = "ink,style,ink,picture,,\n"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0, "eta": 0.0, "precision": "fp32"}
SEARCH = {  # of rows with strength auto
    "looks": [1],
    "scales": [1.0, 2.0],
    "ladder": [{}, {"preserve": "distill"}],
    "images": {"target": 4, "anchor": 4, "neighbor": 4},
    "batches": 2,
    "sampler": None,
}
SMALL = {
    "model": {"path": "models/pipeline", "revision": None},
    "prompts": {"count": 4},
    "anchors": {"images": 4, "sampler": SAMPLER},
    # The tiny text encoder is so narrow that a null space leaves nothing to change, and a search would take most of the time.
    "training": {
        "steps": 2,
        "batch_size": 2,
        "precision": "fp32",
        "preserve": "none",
        "strength": "fixed",
        "search": SEARCH,
        "harden": {"tokens": 2, "steps": 2, "batch_size": 2, "images": 2},
    },
    "evaluation": {
        "images": {"target": 4, "anchor": 4, "neighbor": 4},
        "sampler": SAMPLER,
        "scorer": {"model": "models/clip", "pretrained": None},
        "statistics": {"bootstrap": 20},
        "interference": "none",  # what rows do to each other's concepts has a test of its own, test_harm.py
        "wordings": {"images": 0},  # and so has what brings a target back, test_attacks_run.py
    },
    "bundles": {"general": {"images": 4}},
    "runtime": {"device": "cpu", "sample_batch_size": 4, "threads": 1},
}


@dataclass(frozen=True)
class Checkout:
    """A folder that Snakemake runs in, as a user's checkout."""

    folder: Path

    def snakemake(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run Snakemake here; stdout and stderr together are in `.stdout`. There is no network.

        `environment`: further variables.
        """
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            check=False,
            cwd=self.folder,
            env={**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def write(self, table: str, name: str = "concepts.csv") -> None:
        """Write the table of concepts."""
        (self.folder / name).write_text(table, encoding="utf-8")

    def prepare(self, table: str, but: Sequence[str], overlay: str = "small.yaml") -> None:
        """Do the table's work in this process, which loads torch once, without the stages `but` and what needs them.

        For what a test's own run need not show: a job of Snakemake's takes seconds to start.
        """
        with contextlib.chdir(self.folder):
            config = read_config("config/config.yaml")
            merge(config, read_config(overlay))
            Path("prepared.csv").write_text(table, encoding="utf-8")
            config["concepts"] = "prepared.csv"
            run_stages(load_plan(config, Path("workflow/schemas"), overlay)[1], but, batch_size=4)

    def jobs(self, *configfiles: str) -> dict[str, int]:
        """Rule -> number of jobs that a run would start now, `all` aside."""
        done = self.snakemake("--dry-run", "--configfile", *configfiles)
        assert done.returncode == 0, done.stdout
        _, _, table = done.stdout.partition("Job stats:")
        found = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
        assert found or "Nothing to be done" in done.stdout, done.stdout
        return {rule: count for rule, count in found.items() if rule not in ("all", "total")}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline and a tiny CLIP, random weights."""
    from tests.tiny import make_tiny_pipeline
    from tests.tiny_clip import make_tiny_clip

    folder = tmp_path_factory.mktemp("models")
    make_tiny_pipeline(folder / "pipeline", size=32)
    make_tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def make_checkout(models, tmp_path_factory):
    """`make_checkout()` gives a new checkout with the tiny models in `models/` and the config `small.yaml`."""

    folders = []

    def make() -> Checkout:
        folder = tmp_path_factory.mktemp("checkout")
        folders.append(folder)
        shutil.copy(ROOT / "Snakefile", folder)
        for name in ("workflow", "profiles", "local", "config"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "concept_ablation").symlink_to(ROOT / "concept_ablation")
        (folder / "models").symlink_to(models)
        (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
        return Checkout(folder)

    yield make
    left = [line for folder in folders for line in end(processes_of(folder))]
    assert not left, "these still ran, and were killed:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def finished(make_checkout) -> Checkout:
    """A checkout in which the rows CAT and INK have been run, as on one machine with two GPUs, 5 and 7."""
    checkout = make_checkout()
    checkout.write(HEADER + CAT + INK)
    own = {**SMALL, "runtime": {**SMALL["runtime"], "device": "auto"}}
    (checkout.folder / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    # More cores than devices: only the number of GPU jobs is limited.
    limits = ("--profile", "local", "--cores", "4", "--resources", "gpu=2", "--configfile", "own.yaml")
    locks = str(checkout.folder / "locks")
    done = checkout.snakemake(*limits, CUDA_VISIBLE_DEVICES="5,7", CONCEPT_ABLATION_LOCKS=locks)
    assert done.returncode == 0, done.stdout
    (checkout.folder / "run.txt").write_text(done.stdout, encoding="utf-8")
    return checkout
