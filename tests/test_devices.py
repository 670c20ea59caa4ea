"""Claims of GPUs by real processes, with made-up devices: nothing here needs one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from concept_ablation.common.gpu_locks import ClaimError, claim_device, lock_folder, visible_devices
from concept_ablation.jobs.job import start_job

ROOT = Path(__file__).parents[1]
JOB = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from concept_ablation.common.gpu_locks import claim_device
claim_device(int(sys.argv[1]), poll_seconds=0.05)
print("has", os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """`start()` gives a process that claims one of the devices 0 and 1 and keeps it until it is ended."""
    started = []

    def run(per_device: int = 1, **environment: str) -> subprocess.Popen:
        given = {"CUDA_VISIBLE_DEVICES": "0,1", "CONCEPT_ABLATION_LOCKS": str(tmp_path), **environment}
        own = {**os.environ, **given, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"}
        own.pop("SLURM_JOB_ID", None)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", JOB, str(per_device)],
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def device(process: subprocess.Popen) -> str:
    """The device that a process says it has, once it has it; torch isn't imported by then."""
    for line in process.stdout:
        if line.startswith("has "):
            _, name, torch = line.split()
            assert torch == "False"
            return name
    raise AssertionError("the process ended without a device")


def test_two_jobs_have_two_devices_and_a_third_waits_until_one_is_free(start):
    first, second = start(), start()
    owners = {device(first): first, device(second): second}
    assert owners.keys() == {"0", "1"}
    third = start()
    assert "waiting: all GPUs (0, 1) are in use" in third.stdout.readline()
    owners["0"].communicate("")  # it ends in peace
    assert device(third) == "0"


def test_a_killed_jobs_device_is_free_again(start):
    first, second = start(), start()
    owners = {device(first): first, device(second): second}
    waiting = start()
    assert "waiting" in waiting.stdout.readline()
    os.kill(owners["1"].pid, signal.SIGKILL)
    assert device(waiting) == "1"


def test_devices_are_shared_when_asked_and_only_then_one_by_one(start):
    names = [device(start(2)) for _ in range(4)]
    assert sorted(names[:2]) == sorted(names[2:]) == ["0", "1"]
    assert "waiting" in start(2).stdout.readline()


def test_a_lock_file_names_its_process(start, tmp_path):
    process = start()
    assert (tmp_path / f"{device(process)}.0.lock").read_text() == f"{process.pid}\n"


@pytest.mark.parametrize(
    "given", [{"SLURM_JOB_ID": "7"}, {"CUDA_VISIBLE_DEVICES": ""}], ids=["SLURM", "none"]
)
def test_nothing_is_claimed_under_slurm_or_without_a_device(given, tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "0", "CONCEPT_ABLATION_LOCKS": str(tmp_path / "locks"), **given}
    before = dict(environment)
    assert claim_device(environment=environment) is None
    assert environment == before and not (tmp_path / "locks").exists()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi tells three devices."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-aa11\necho GPU-bb22\necho GPU-cc33\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        (None, ["GPU-aa11", "GPU-bb22", "GPU-cc33"]),
        ("2,0", ["GPU-cc33", "GPU-aa11"]),
        ("1, GPU-bb", ["GPU-bb22"]),
        ("MIG-1,7", ["MIG-1", "7"]),
        ("0,-1,1", ["GPU-aa11"]),
        ("", []),
    ],
)
def test_a_device_has_one_name_however_it_is_written(machine, allowed, found):
    assert visible_devices(allowed) == found


def test_a_broken_nvidia_smi_is_told_and_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_devices("0,1") == ["0", "1"]
    assert "nvidia-smi doesn't answer" in caplog.text


def test_the_lock_folder_is_the_users_own_and_the_same_for_every_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CONCEPT_ABLATION_LOCKS", raising=False)
    folder = lock_folder()
    assert folder == Path(f"/tmp/concept-ablation-gpus-{os.getuid()}")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_lock_folder_that_cannot_be_is_one_plain_error(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {"CONCEPT_ABLATION_LOCKS": str(tmp_path / "file"), "CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(ClaimError, match="file: the lock files .* CONCEPT_ABLATION_LOCKS"):
        claim_device(environment=environment)


@pytest.mark.parametrize(
    ("resources", "claims"),
    [
        ({"gpu": 1, "device": "auto"}, True),
        ({"gpu": 1, "device": "cuda"}, True),
        ({"gpu": 1, "device": "cpu"}, False),
        ({"gpu": 1, "device": "mps"}, False),
        ({"gpu": 0, "device": "auto"}, False),
        ({}, False),
    ],
)
def test_a_job_claims_if_it_asks_for_a_gpu_and_may_use_cuda(resources, claims, monkeypatch, tmp_path):
    class Resources(SimpleNamespace):
        def get(self, name, default):
            return getattr(self, name, default)

    asked = []
    monkeypatch.setattr("concept_ablation.jobs.job.claim_device", asked.append)
    monkeypatch.setattr("concept_ablation.common.logs.setup_logging", lambda path, results: None)
    monkeypatch.setattr("concept_ablation.common.logs.tell_end", lambda path: None)
    monkeypatch.setattr("concept_ablation.common.logs.raise_signals", lambda: None)
    config = {"results": str(tmp_path), "runtime": {"gpu_jobs_per_device": 3}}
    start_job(SimpleNamespace(log=[str(tmp_path / "x.log")], resources=Resources(**resources), config=config))
    assert asked == ([3] if claims else [])
