"""A row that fails or a run that is ended: what is finished is in the report, and a later run makes all whole."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from concept_ablation.__main__ import main
from tests.workflow.conftest import CAT, OFFLINE

pytestmark = pytest.mark.workflow
HEADER = "concept,kind,target,anchor,neighbors,delta\n"
BAD = "<b>bad.safetensors"
TABLE = HEADER + CAT + f"owl,object,owl,bird,,{BAD}\n"
RUN = ("--cores", "2", "--configfile", "small.yaml")


@pytest.fixture(scope="module")
def failed(make_checkout):
    """A checkout after a run in which row `owl` failed and row `cat` did not; what was said is in run.txt."""
    import numpy as np

    checkout = make_checkout()
    save_file({"x": np.zeros(2, np.float32)}, checkout.folder / BAD)
    checkout.prepare(TABLE, but=("import_delta", "score_concept"))
    checkout.write(TABLE)
    done = checkout.snakemake(*RUN)
    assert done.returncode != 0
    (checkout.folder / "run.txt").write_text(done.stdout)
    return checkout


def concepts(checkout, table: str = "summary") -> list[str]:
    with (checkout.folder / "results" / "report" / f"{table}.csv").open() as file:
        return [line["concept"] for line in csv.DictReader(file)]


def test_the_terminal_says_in_one_line_why_and_shows_no_traceback(failed):
    said = (failed.folder / "run.txt").read_text()
    assert "import_delta failed, for owl (log: results/logs/import_delta/" in said
    assert "which is no delta" in said and "run the same command again" in said
    assert "Traceback" not in said
    (log,) = (failed.folder / "results" / "logs" / "import_delta").glob("*.log")
    assert "Traceback" in log.read_text()


def test_the_report_shows_the_finished_row_and_the_failure(failed):
    assert concepts(failed) == ["cat"] and set(concepts(failed, "scores")) == {"cat"}
    page = (failed.folder / "results" / "report" / "index.html").read_text()
    assert "<code>import_delta</code> failed for owl" in page and "which is no delta" in page
    assert "&lt;b&gt;bad" in page and "<b>bad" not in page


def test_the_tables_hold_the_finished_row_and_say_which_is_missing(failed, tmp_path, monkeypatch, capsys):
    report = failed.folder / "results" / "report"
    for name in ("scores", "summary"):
        table = pq.read_table(report / f"{name}.parquet")
        assert set(table["concept"].to_pylist()) == {"cat"}
        about = json.loads(table.schema.metadata[b"concept_ablation"])
        assert (about["rows"], about["missing"]) == (1, ["owl"])
    assert not (report / "complete.json").exists()
    monkeypatch.chdir(failed.folder)
    assert main(["card", "results", "cat", "--out", str(tmp_path / "cat")]) == 0
    assert (tmp_path / "cat" / "delta.safetensors").is_file()
    assert main(["card", "results", "owl", "--out", str(tmp_path / "owl")]) == 2
    assert "results: 'owl' is not finished" in capsys.readouterr().err and not (tmp_path / "owl").exists()


def test_an_unfinished_report_is_never_up_to_date(failed):
    """Whatever the user does next, repair the row or take it out, the report is made again."""
    failed.write(HEADER + CAT)
    try:
        assert failed.jobs("small.yaml") == {"aggregate_scores": 1, "render_report": 1}
    finally:
        failed.write(TABLE)


def test_a_repaired_row_makes_the_report_whole(failed):
    repaired = TABLE.replace(BAD, "")
    failed.prepare(repaired, but=("score_concept",))
    failed.write(repaired)
    done = failed.snakemake(*RUN)
    assert done.returncode == 0, done.stdout
    assert concepts(failed) == ["cat", "owl"]
    assert "This report is not whole" not in (failed.folder / "results" / "report" / "index.html").read_text()
    assert json.loads((failed.folder / "results/report/complete.json").read_text())["rows"] == 2
    assert failed.jobs("small.yaml") == {}


def test_without_any_finished_row_there_is_a_page_of_failures(make_checkout):
    checkout = make_checkout()
    (checkout.folder / "bad.bin").write_bytes(b"no delta")
    table = HEADER + "owl,object,owl,bird,,bad.bin\n"
    checkout.prepare(table, but=("import_delta",))
    checkout.write(table)
    done = checkout.snakemake(*RUN)
    assert done.returncode != 0 and "import_delta failed, for owl" in done.stdout, done.stdout
    page = (checkout.folder / "results" / "report" / "index.html").read_text()
    assert "No concept is finished yet" in page and "failed for owl" in page
    assert concepts(checkout) == []


# As in a terminal, whatever started the tests: a background job's SIGINT may be ignored.
SNAKEMAKE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("snakemake", run_name="__main__")
"""


def end(checkout, name: str) -> str:
    """Start a run, and while it trains send signal `name` to all of it, SIGKILL to the training alone; what the run says."""
    own = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SNAKEMAKE, "--cores", "1", "--configfile", "small.yaml"]
    with subprocess.Popen(
        command,
        cwd=checkout.folder,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            logs = checkout.folder / "results" / "logs" / "ablate_concept"
            while run.poll() is None and not any(log.stat().st_size for log in logs.glob("*grinning*.log")):
                time.sleep(0.1)
            if name == "SIGKILL":
                jobs = psutil.Process(run.pid).children(recursive=True)
                (job,) = (job for job in jobs if job.cmdline()[-1].endswith("run_stage.py"))
                job.kill()
            else:
                os.killpg(run.pid, getattr(signal, name))
            said = run.communicate()[0]
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode not in (0, None), said
    return said


@pytest.mark.parametrize(
    ("name", "how"),
    [("SIGINT", "was ended by SIGINT"), ("SIGTERM", "was ended by SIGTERM"), ("SIGKILL", "was killed")],
)
def test_what_is_ended_from_outside_did_not_fail(failed, name, how):
    """A row that would train for days joins the table, and its run is ended; `cat` stays finished."""
    new = HEADER.replace("delta", "steps") + CAT + "new,object,grinning cat,cat,weary cat,"
    for log in (failed.folder / "results" / "logs" / "ablate_concept").glob("*grinning*.log"):
        log.unlink()
    failed.write(new + "1000000\n")
    said = end(failed, name)
    assert f"ablate_concept {how}, for new (log: " in said and " failed, for" not in said
    assert ("Stopped. " in said) == (name != "SIGKILL") and "Traceback" not in said
    report = failed.folder / "results" / "report"
    assert pq.read_table(report / "summary.parquet")["concept"].to_pylist() == ["cat"]
    assert f"<code>ablate_concept</code> {how} for new" in (report / "index.html").read_text()
    assert not (report / "complete.json").exists()
    for log in (failed.folder / "results" / "logs").glob("*/*.log"):
        os.utime(log, (time.time() - 3600,) * 2)  # what was silent for less may run in another checkout
    status = subprocess.run(
        [sys.executable, "-m", "concept_ablation", "status", "--configfile", "small.yaml"],
        check=True,
        cwd=failed.folder,
        capture_output=True,
        text=True,
    )
    assert f"1 ended, 0 running, 0 failed\n   ended  new: ablate_concept: {how}" in status.stdout
    assert failed.jobs("small.yaml")["aggregate_scores"] == 1


def test_after_that_a_whole_run_leaves_nothing_to_do(failed):
    failed.write(HEADER + CAT)
    assert failed.jobs("small.yaml") == {"aggregate_scores": 1, "render_report": 1}
    done = failed.snakemake(*RUN)
    assert done.returncode == 0, done.stdout
    about = json.loads((failed.folder / "results/report/complete.json").read_text())
    assert (about["rows"], about["missing"]) == (1, []) and failed.jobs("small.yaml") == {}
