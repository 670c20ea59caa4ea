"""How a job or a run ended: what its log says, what the user is told, and what is left in the report's folder."""

import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation.report.failures import failure_text, find_failures, read_end, report_unfinished
from tests.test_damage import FewKeys

JOB = """
import signal, sys
from pathlib import Path
from concept_ablation.common.files import atomic_output
from concept_ablation.common.logs import setup_logging, tell_end

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, whatever started the tests
signal.signal(signal.SIGHUP, signal.SIG_DFL)
setup_logging(sys.argv[1])
tell_end(sys.argv[1])
with atomic_output(Path(sys.argv[1]).with_name("out")) as part:
    part.write_text("half")
    {what}
"""
WAIT = "print('ready', flush=True); sys.stdin.read()"


def run(what, log, number=None):
    """Run a job that does `what`, or waits for the signal `number`; returns its exit status."""
    command = [sys.executable, "-c", JOB.format(what=what), log]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        if number:
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
        return process.wait()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_job_with_its_name_in_the_log_and_nothing_half_written(tmp_path, name):
    log = tmp_path / "x.log"
    assert run(WAIT, log, getattr(signal, name)) != 0
    assert read_end(log, stopped=False)[0] == f"was ended by {name}"
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]


EARLY = """
import os, signal, sys
from concept_ablation.common import logs
from concept_ablation.jobs.job import _prepare

logs._where = lambda: os.kill(os.getpid(), signal.SIGTERM)
_prepare({"log": sys.argv[1], "results": "results", "gpu_jobs": None})
"""


def test_a_signal_that_comes_with_the_logs_first_line_is_told_too(tmp_path):
    log = tmp_path / "x.log"
    done = subprocess.run([sys.executable, "-c", EARLY, log], check=False, stderr=subprocess.DEVNULL)
    assert done.returncode != 0
    assert read_end(log, stopped=True)[0] == "was ended by SIGTERM"


def test_a_job_whose_log_just_ends_was_killed_or_ended_with_its_run(tmp_path):
    log = tmp_path / "x.log"
    assert run(WAIT, log, signal.SIGKILL) == -signal.SIGKILL
    how, lines = read_end(log, stopped=False)
    assert how == "was killed" and "SIGKILL: often the machine's memory was full" in lines[0]
    how, lines = read_end(log, stopped=True)
    assert how == "was ended" and not any("memory" in line for line in lines)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import faulthandler; faulthandler._sigsegv()", "Fatal Python error: Segmentation fault"),
        ("import os; os.kill(os.getpid(), 4)", "Fatal Python error: Illegal instruction"),
    ],
)
@pytest.mark.parametrize("stopped", [False, True])
def test_an_error_or_a_crash_is_a_failure_whatever_became_of_the_run(tmp_path, what, says, stopped):
    log = tmp_path / "x.log"
    assert run(what, log) != 0
    how, lines = read_end(log, stopped)
    assert how == "failed" and any(says in line for line in lines) and len(lines) <= 12


def test_a_script_that_went_well_fails_by_what_comes_after_it(tmp_path):
    log = tmp_path / "x.log"
    assert run("pass", log) == 0 and (tmp_path / "out").read_text() == "half"
    (failure,) = find_failures(FewKeys(tmp_path), [("render_report", None, str(log))])
    assert failure.how == "failed" and "its script went well" in failure.lines[0]
    assert find_failures(FewKeys(tmp_path), [("render_report", None, str(log))], stopped=True) == []


def test_words_of_a_run_that_was_ended(tmp_path):
    """What failed before comes first; a job without a log of this run was ended before it began; a finished one is none."""
    plan = FewKeys(tmp_path / "results")
    first, second = (row.ablation for row in plan.rows)
    logs = {name: tmp_path / f"{name}.log" for name in ("failed", "ended", "old")}
    logs["failed"].write_text("2026 CRITICAL x: ValueError: no\n")
    logs["ended"].write_text(
        "2026 INFO x: step 7\n2026 ERROR concept_ablation.common.logs: ended by SIGTERM\n"
    )
    logs["old"].write_text("2026 CRITICAL x: of another run\n")
    os.utime(logs["old"], (1000, 1000))
    jobs = [
        ("ablate_concept", first, str(logs["ended"])),
        ("ablate_concept", second, str(logs["old"])),
        ("generate_anchors", plan.shared, str(logs["failed"])),
    ]
    said = failure_text(find_failures(plan, jobs, stopped=True, since=2000.0)).splitlines()
    assert said == [
        f"generate_anchors failed, for a, b (log: {logs['failed']})",
        "    2026 CRITICAL x: ValueError: no",
        f"ablate_concept was ended by SIGTERM, for a (log: {logs['ended']})",
        "    2026 INFO x: step 7",
        f"ablate_concept was ended, for b (log: {logs['old']})",
    ]
    made = tmp_path / plan.path(first)
    made.parent.mkdir(parents=True)
    made.write_text("x")
    found = find_failures(plan, jobs, stopped=True, since=2000.0)
    assert [failure.key for failure in found] == [plan.shared, second]


@pytest.mark.parametrize("where", ["tables.aggregate_scores", "page.render"])
def test_an_interrupted_report_of_what_is_finished_leaves_no_mark(tmp_path, monkeypatch, where):
    """Interrupted at the tables it leaves those of before; at the page new ones, without a row that is in the table no more."""
    plan = FewKeys(tmp_path / "results")
    folder = tmp_path / "results" / "report"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text("{}")
    pq.write_table(pa.table({"concept": ["gone"]}), folder / "summary.parquet")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"concept_ablation.report.{where}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report_unfinished(plan, [])
    assert not (folder / "complete.json").exists()
    table = pq.read_table(folder / "summary.parquet")
    if where == "page.render":
        assert table.num_rows == 0
        assert json.loads(table.schema.metadata[b"concept_ablation"])["missing"] == ["a", "b"]
        names = sorted(path.name for path in folder.iterdir())
        tables = [f"{table}.{end}" for table in ("costs", "scores", "summary") for end in ("csv", "parquet")]
        assert names == sorted([*tables, "columns.json", "images.parquet"])
    else:
        assert table["concept"].to_pylist() == ["gone"]
