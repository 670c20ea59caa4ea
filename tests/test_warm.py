"""Jobs that a warm process forks: what their scripts' callers see is what they would see of the work itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from concept_ablation.jobs import warm

# As in a terminal, whatever started the tests: a background job's SIGINT and SIGHUP may be ignored.
SCRIPT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from concept_ablation.jobs.warm import hand_over
code = hand_over(json.loads(sys.argv[1]))
sys.exit(99 if code is None else code)
"""
STARTED: list[subprocess.Popen] = []
ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A warm process of small jobs, which ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(warm.VARIABLE, "")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    warm.start(1, tmp_path / "logs" / "warm.log", "tests.warm_jobs")
    yield tmp_path
    warm.stop()
    for job in STARTED:
        if job.poll() is None:
            job.kill()
            job.communicate()
    STARTED.clear()
    assert (tmp_path / "logs" / "warm.log").read_text() == ""


def script(folder: Path, then: str = "end", **settings) -> subprocess.Popen:
    """Start a job's script, in `folder`."""
    job = json.dumps({"log": "job.log", "then": then})
    environment = {**os.environ, "MARK": "of the script", **settings}
    started = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, job],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(started)
    return started


def wait_for_log(folder: Path) -> psutil.Process:
    """The worker, once it works."""
    deadline = time.monotonic() + 60
    while not (folder / "seen").exists() or not (folder / "seen").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return psutil.Process(int((folder / "seen").read_text().split()[-1]))


def test_a_job_has_its_scripts_folder_environment_and_output(running):
    job = script(running)
    said, warned = job.communicate(timeout=60)
    assert job.returncode == 0 and "to stdout" in said and "to stderr" in warned
    seen = (running / "seen").read_text().split()
    assert seen[:-1] == ["of", "the", "script", str(running)] and int(seen[-1]) != job.pid
    end = (running / "job.log").read_text().splitlines()[-2:]
    assert "CPU s" in end[0] and end[1].endswith("the script is done")


def test_jobs_run_side_by_side(running):
    folders = [running / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    jobs = [script(folder) for folder in folders]
    for job in jobs:
        job.communicate(timeout=60)
    assert [job.returncode for job in jobs] == [0] * 4
    assert len({(folder / "seen").read_text() for folder in folders}) == 4


def test_an_error_is_in_the_log_and_in_the_exit_code(running):
    job = script(running, "fail")
    _, warned = job.communicate(timeout=60)
    assert job.returncode == 1 and "ValueError: no such thing" in warned
    log = (running / "job.log").read_text()
    assert log.endswith("ValueError: no such thing\n") and "Traceback" in log


def test_a_crash_of_native_code_ends_the_script_in_the_same_way(running):
    job = script(running, "crash")
    job.communicate(timeout=60)
    assert job.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in (running / "job.log").read_text()


@pytest.mark.parametrize("number", warm.SIGNALS)
def test_a_signal_to_the_script_ends_the_work(running, number):
    job = script(running, "wait")
    worker = wait_for_log(running)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == 1 and not worker.is_running()
    assert (running / "job.log").read_text().endswith(f"ended by {signal.Signals(number).name}\n")


def test_a_script_that_is_killed_takes_its_work_along(running):
    job = script(running, "wait")
    worker = wait_for_log(running)
    job.kill()
    job.communicate(timeout=60)
    assert psutil.wait_procs([worker], timeout=60)[0] == [worker]


def test_work_that_is_killed_takes_its_script_along(running):
    job = script(running, "wait")
    wait_for_log(running).kill()
    job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL


def test_a_keeper_that_is_killed_fails_the_job(running):
    job = script(running, "wait")
    worker = wait_for_log(running)
    worker.parent().kill()
    job.communicate(timeout=60)
    assert job.returncode == 1
    assert psutil.wait_procs([worker], timeout=60)[0] == [worker]


def test_the_warm_process_ends_with_the_one_that_started_it(tmp_path):
    code = f"""
from concept_ablation.jobs import warm
import time
warm.start(1, {str(tmp_path / "warm.log")!r}, "tests.warm_jobs")
print(warm._started[0].pid, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    process = psutil.Process(int(starter.stdout.readline()))
    starter.kill()
    starter.communicate()
    assert psutil.wait_procs([process], timeout=60)[0] == [process]


@pytest.mark.parametrize(
    "setting", [{"OMP_NUM_THREADS": "2"}, {warm.VARIABLE: "nobody"}, {warm.VARIABLE: ""}]
)
def test_a_job_that_no_warm_process_suits_is_left_to_its_script(running, setting):
    job = script(running, **setting)
    job.communicate(timeout=60)
    assert job.returncode == 99 and not (running / "seen").exists()


def test_after_the_end_jobs_are_left_to_their_scripts(running):
    name = os.environ[warm.VARIABLE]
    warm.stop()
    job = script(running, **{warm.VARIABLE: name})
    job.communicate(timeout=60)
    assert job.returncode == 99 and warm.VARIABLE not in os.environ


def test_only_cpus_of_linux_are_served(monkeypatch):
    monkeypatch.setattr(warm, "visible_devices", lambda allowed: [])
    monkeypatch.setattr(sys, "platform", "linux")
    assert warm.serves("cpu") and warm.serves("auto") and not warm.serves("cuda") and not warm.serves("mps")
    monkeypatch.setattr(warm, "visible_devices", lambda allowed: ["0"])
    assert warm.serves("cpu") and not warm.serves("auto")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not warm.serves("cpu")
