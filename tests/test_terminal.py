"""A run in a terminal: bars that jobs tell through files, a line for each job, each row's verdict, nothing where there is no terminal."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from concept_ablation.common import progress
from concept_ablation.common.progress import VARIABLE, Progress, progress_bar, read_progress, tell_progress_of
from concept_ablation.plan.checks import read_table
from concept_ablation.report import terminal
from concept_ablation.report.status import watch

ROOT = Path(__file__).parents[1]
TABLE = "concept,kind,target,anchor,neighbors\nowl,object,owl,bird,duck\n"


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "rows.csv").write_text(TABLE)
    own = {"concepts": str(tmp_path / "rows.csv"), "results": str(tmp_path / "results")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    return read_table([str(tmp_path / "own.yaml")])[1]


@pytest.fixture
def handler(plan, tmp_path):
    """A display that is drawn into `handler.console.file`, wide enough for whole lines."""
    return terminal.TerminalHandler(plan, Console(file=io.StringIO(), width=160), str(tmp_path))


def event(name, level=logging.INFO, message="", **fields):
    record = logging.LogRecord("snakemake", level, __file__, 1, message, None, None)
    record.__dict__ |= {"event": name} if name else {}
    record.__dict__ |= fields
    return record


def start(handler, number, rule, key, log):
    handler.emit(event("job_info", jobid=number, rule_name=rule, wildcards={"key": key}, log=[str(log)]))


def drawn(handler):
    with handler.console.capture() as captured:
        handler.console.print(handler.draw())
    return captured.get()


def said(handler):
    return handler.console.file.getvalue()


def test_a_job_tells_its_progress_through_a_file_and_writes_nothing_to_the_terminal(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(progress, "_file", None)
    monkeypatch.setattr(progress, "EVERY", 0)
    log = tmp_path / "logs" / "sample_base" / "object-owl.0123.log"
    assert tell_progress_of(log)
    assert read_progress(tmp_path, log) is None
    with progress_bar(total=4, desc="owl", unit="image") as bar:
        bar.update(3)
        assert read_progress(tmp_path, log) == Progress("owl", 3, 4, "image")
    assert [list(progress_bar(range(2), unit="step")), read_progress(tmp_path, log).done] == [[0, 1], 2]
    assert capfd.readouterr() == ("", "")


def test_without_a_display_bars_go_to_stderr(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not tell_progress_of(tmp_path / "x.log")
    list(progress_bar(range(2), desc="owl"))
    assert "owl" in capfd.readouterr().err


def test_a_folder_that_is_gone_counts_as_no_display(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert not tell_progress_of(tmp_path / "x.log")


def test_a_script_that_tells_its_progress_still_has_its_log_and_its_exit_status(tmp_path):
    code = "from concept_ablation.common.logs import setup_logging\nsetup_logging('r/key.log')\nraise OSError('disk')"
    environment = {**os.environ, VARIABLE: str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
    assert "CRITICAL" in (tmp_path / "r" / "key.log").read_text()


def test_each_job_has_a_line_with_its_progress(handler, plan, tmp_path):
    row = plan.rows[0]
    start(
        handler, 7, "sample_ablated", row.samples, tmp_path / "logs" / "sample_ablated" / f"{row.samples}.log"
    )
    handler.emit(event("progress", done=2, total=9))
    assert (
        "sample_ablated" in drawn(handler)
        and "object-owl" in drawn(handler)
        and "2 of 9 jobs" in drawn(handler)
    )
    (tmp_path / f"sample_ablated.{row.samples}").write_text('["", 16, 56, "image"]')
    assert "16/56 images" in drawn(handler)
    handler.emit(event("job_finished", job_id=7))
    assert "object-owl" not in drawn(handler)


def test_in_a_terminal_of_80_columns_the_numbers_stay_whole(handler, tmp_path, monkeypatch):
    handler.console.width = 80
    key = "memorization-the-midnight-garden-poster.0"
    start(handler, 1, "measure_interference", key, tmp_path / "measure_interference" / f"{key}.log")
    (tmp_path / f"measure_interference.{key}").write_text('["", 100, 2480, "image"]')
    handler.emit(event("progress", done=101, total=1280))
    monkeypatch.setattr(handler.state, "seconds_left", lambda: 5000)
    shown = drawn(handler)
    for whole in (
        "measure_interference memori",
        "100/2480 images",
        "about 1 h 23 min left",
        "101 of 1280 jobs",
    ):
        assert whole in shown, shown


def test_many_jobs_take_no_more_lines_than_the_terminal_has(handler, tmp_path):
    handler.console.height = 10
    for number in range(30):
        start(handler, number, "sample_base", f"object-{number}.0", tmp_path / "l")
    assert len(drawn(handler).splitlines()) <= 10 and "and 24 more" in drawn(handler)


def test_snakemakes_chatter_is_left_out_and_what_is_wrong_is_printed(handler, tmp_path):
    handler.emit(event(None, message="Select jobs to execute..."))
    handler.emit(event(None, logging.WARNING, "x.csv was empty [/bold]"))
    start(handler, 1, "ablate_concept", "object-owl.0123", tmp_path / "l")
    handler.emit(event("job_error", logging.ERROR, jobid=1, rule_name="ablate_concept", log=["logs/owl.log"]))
    assert "Select" not in said(handler) and "x.csv was empty [/bold]" in said(handler)
    assert "failed  ablate_concept object-owl.0123 (its log: logs/owl.log)" in said(handler)
    assert not handler.state.running


def test_a_scored_row_is_told_with_its_verdict(handler, plan, tmp_path, monkeypatch):
    line = {
        "concept": "owl",
        "verdict": "removed, neighbors kept",
        "firmness": "firm",
        "presence_base": 0.95,
        "presence_ablated": 0.02,
        "worst_neighbor": "duck",
        "worst_neighbor_typical_change": -0.125,
    }
    monkeypatch.setattr("concept_ablation.report.summary.summarise", lambda *_: line)
    monkeypatch.setattr("concept_ablation.report.tables.read_scores", lambda _: None)
    start(handler, 1, "score_concept", plan.rows[0].scores, tmp_path / "l")
    handler.emit(event("job_finished", job_id=1))
    wanted = "ok  owl: removed, neighbors kept (firm); target 95% -> 2%; worst neighbor duck −12.5\n"
    assert said(handler) == wanted


def test_scores_that_cannot_be_read_do_not_end_a_run(handler, plan, tmp_path):
    start(handler, 1, "score_concept", plan.rows[0].scores, tmp_path / "l")
    handler.emit(event("job_finished", job_id=1))
    assert said(handler) == ""


def test_the_time_left_is_told_once_every_stage_that_is_left_was_measured(plan):
    state = terminal.RunState(plan)
    assert state.left["sample_base"] == 3 and state.seconds_left() is None
    state.took = {stage: [10.0] for stage in state.left}
    assert state.seconds_left() == 10.0 * sum(state.left.values())
    state.running = {
        1: terminal.Running("sample_base", "a", None),
        2: terminal.Running("sample_base", "b", None),
    }
    assert state.seconds_left() == pytest.approx(5.0 * sum(state.left.values()), abs=0.5)


def test_without_a_terminal_snakemakes_lines_stay(plan):
    logger, standard = logging.getLogger("stand-in of Snakemake"), logging.StreamHandler(io.StringIO())
    standard.name = terminal.STANDARD
    logger.addHandler(standard)
    logger.setLevel(logging.INFO)
    terminal.show(plan, logger, [])
    assert logger.handlers == [standard] and VARIABLE not in os.environ
    terminal.end()


def test_watching_ends_with_ctrl_c(capsys):
    texts = iter(["one row done", "two rows done"])

    def told():
        try:
            return next(texts)
        except StopIteration:
            raise KeyboardInterrupt from None

    assert watch(told, pause=0) == "two rows done"
    assert "one row done" in capsys.readouterr().out
