"""A run that is killed, starved of disk or damaged ends, after reruns, with the tables of an undisturbed one, byte for byte.

`make chaos`, as root (a small disk is mounted): about half an hour on 2 cores. CHAOS_KILLS and CHAOS_SEED change the number
of kills and the random moments. What is done between two runs is what a user would do: start again, after a SIGKILL of
Snakemake with `--unlock` first, as its message says.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import OFFLINE, Checkout

pytestmark = pytest.mark.chaos
KILLS = int(os.environ.get("CHAOS_KILLS", "50"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
TABLE = "concept,kind,target,anchor\nink,style,ink,picture\n"
RUN = (
    "--cores",
    "2",
    "--configfile",
    "small.yaml",
    "--config",
    'runtime={"checkpoint_steps": 1}',
    'training={"steps": 3}',
)
TIMED = ("training_seconds", "peak_memory_mb", "run")
COST = "cost_"  # how the summary's columns of what a row cost begin


def tables(checkout: Checkout) -> dict[str, object]:
    """The CSV tables: the scores' bytes, the summary's lines without what a clock or the memory's use says."""
    folder = checkout.folder / "results" / "report"
    with (folder / "summary.csv").open() as file:
        lines = [
            {k: v for k, v in line.items() if k not in TIMED and not k.startswith(COST)}
            for line in csv.DictReader(file)
        ]
    return {"scores": (folder / "scores.csv").read_bytes(), "summary": lines}


def start(checkout: Checkout) -> subprocess.Popen:
    """Snakemake in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *RUN],
        cwd=checkout.folder,
        env={**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(checkout: Checkout, most: int = 4) -> int:
    """Run until all is done, at most `most` times; returns how many runs it took."""
    for number in range(1, most + 1):
        done = checkout.snakemake(*RUN)
        if "cannot be locked" in done.stdout:
            assert "--unlock" in done.stdout
            assert checkout.snakemake(*RUN, "--unlock").returncode == 0
            done = checkout.snakemake(*RUN)
        if done.returncode == 0:
            return number
    pytest.fail(f"not whole after {most} runs:\n{done.stdout[-6000:]}")


def check_equal(checkout: Checkout, undisturbed: dict[str, object]) -> None:
    assert tables(checkout) == {name: undisturbed[name] for name in ("scores", "summary")}


def jobs_of(group: int) -> list[int]:
    """The scripts that run in a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) != group:
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b".snakemake/scripts/" in word for word in words):
            found.append(int(entry.name))
    return found


def rules_at_work(folder: Path) -> set[str]:
    """The rules whose work is being done below `folder`, by the logs that processes have open: a warm job's is in no group of the run."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            for file in (entry / "fd").iterdir():
                log = Path(os.readlink(file))
                if log.suffix == ".log" and log.is_relative_to(folder / "results" / "logs"):
                    found.add(log.parent.name if log.parent.name != "logs" else log.stem)
    return found - {"warm_start"}


@pytest.fixture(scope="module")
def undisturbed(make_checkout) -> dict[str, object]:
    """The tables of a run that nothing disturbs, and its `seconds`: kills come within half of them, so jobs get done too."""
    checkout = make_checkout()
    checkout.write(TABLE)
    began = time.monotonic()
    assert finish(checkout) == 1
    return {**tables(checkout), "seconds": time.monotonic() - began}


@pytest.fixture
def checkout(make_checkout) -> Checkout:
    checkout = make_checkout()
    checkout.write(TABLE)
    return checkout


@pytest.fixture(scope="module")
def done(make_checkout) -> Checkout:
    """A finished checkout, to be damaged and made whole again."""
    checkout = make_checkout()
    checkout.write(TABLE)
    finish(checkout)
    return checkout


def test_killed_at_random_moments(undisturbed, checkout):
    chance, began, hit, kills, rounds = random.Random(SEED), time.monotonic(), {}, 0, 0
    while kills < KILLS:
        if list((checkout.folder / ".snakemake").glob("locks/*")):
            checkout.snakemake(*RUN, "--unlock")
        run = start(checkout)
        limit = time.monotonic() + chance.uniform(0, undisturbed["seconds"] / 2)
        while time.monotonic() < limit and run.poll() is None:
            time.sleep(0.05)
        jobs = jobs_of(run.pid)
        for rule in rules_at_work(checkout.folder) or {"(between jobs)"}:
            hit[rule] = hit.get(rule, 0) + 1
        whom = chance.choice(["group", "snakemake", "job"])
        if run.poll() is None:
            kills += 1
            if whom == "job" and jobs:
                os.kill(chance.choice(jobs), signal.SIGKILL)
                time.sleep(chance.uniform(0, 3))
                kills += run.poll() is None
            if whom == "snakemake":
                run.kill()  # its jobs go on
            elif run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        if (checkout.folder / "results" / "report" / "complete.json").exists() and kills < KILLS:
            wait_for(run.pid)
            finish(checkout)
            check_equal(checkout, undisturbed)
            rounds += 1
            subprocess.run(["rm", "-rf", "results"], cwd=checkout.folder, check=True)
    wait_for(run.pid)
    runs = finish(checkout)
    print(
        f"\n{kills} kills in {(time.monotonic() - began) / 60:.1f} minutes, {rounds} whole rounds, {runs} runs at the end; hit: {hit}"
    )
    check_equal(checkout, undisturbed)


def wait_for(group: int) -> None:
    """Until the jobs that outlived their Snakemake are done."""
    while jobs_of(group):
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("folder", "then", "how"),
    [
        ("prompts", "anchors", "missing"),
        ("anchors", "concepts", "cut"),
        ("concepts", "samples", "cut"),
        ("concepts", "samples", "empty"),
        ("base", "scores", "cut"),
        ("samples", "scores", "cut"),
        ("scores", "report", "cut"),
    ],
)
def test_a_damaged_file_is_noticed_and_made_anew(undisturbed, done, folder, then, how):
    """A file of each stage is damaged, and what is made from it is gone, so that it would be read."""
    results = done.folder / "results"
    damaged = [
        path for path in (results / folder).rglob("*.*") if path.is_file() and path.suffix != ".damaged"
    ]
    for path in damaged:
        content = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    for path in (results / then).rglob("*.*"):
        if path.is_file():
            path.unlink()
    finish(done, most=len(damaged) + 2)
    check_equal(done, undisturbed)
    for path in (results / folder).rglob("*.damaged"):
        path.unlink()


def test_a_full_disk(undisturbed, checkout):
    results = checkout.folder / "results"
    results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", results],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mounted.returncode == 0, f"a small disk can't be mounted (are you root?): {mounted.stderr}"
    try:
        full = checkout.snakemake(*RUN)
        assert full.returncode != 0 and "No space left" in full.stdout, full.stdout[-3000:]
        subprocess.run(["mount", "-o", "remount,size=64m", results], check=True)
        finish(checkout)
        check_equal(checkout, undisturbed)
    finally:
        subprocess.run(["umount", results], check=True)


def test_two_runs_at_once_in_one_results_folder(undisturbed, make_checkout):
    first, second = make_checkout(), make_checkout()
    (first.folder / "results").mkdir()
    (second.folder / "results").symlink_to(first.folder / "results")
    for one in (first, second):
        one.write(TABLE)
    runs = [start(one) for one in (first, second)]
    for run in runs:
        run.wait()
    for one in (first, second):
        finish(one)
        check_equal(one, undisturbed)
