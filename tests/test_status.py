"""`status`: rows by state from files alone, the time left from what was measured, the disk by stage."""

import os
import time
from pathlib import Path

import pytest
import yaml

from concept_ablation.plan.checks import read_table
from concept_ablation.report.formatting import duration
from concept_ablation.report.status import read_costs, status_text

ROOT = Path(__file__).parents[1]
TABLE = """concept,kind,target,anchor,neighbors
owl,object,owl,bird,duck
duck,object,duck,bird,owl
rocket,object,rocket,vehicle,bus
"""
NOW = time.time()


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "rows.csv").write_text(TABLE)
    own = {"concepts": str(tmp_path / "rows.csv"), "results": str(tmp_path / "results")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    return read_table([str(tmp_path / "own.yaml")])[1]


def write(path, text="", when=None):
    """Write a file that was changed at `when`, else now: not at NOW, which is long ago where tests take their time."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    if when is not None:
        os.utime(path, (when, when))


def finish(plan, name):
    """A row's files, as if it were finished."""
    row = next(row for row in plan.rows if row.concept.name == name)
    for file in plan.files(row):
        write(file, "x")
    return row


def log_of(plan, stage, name):
    row = next(row for row in plan.rows if row.concept.name == name)
    key = {"ablate_concept": row.ablation, "sample_ablated": row.samples, "generate_anchors": row.anchors}[
        stage
    ]
    return f"{plan.results}/logs/{stage}/{key}.log"


def test_nothing_done_is_all_waiting_and_of_unknown_length(plan, tmp_path):
    said = status_text(plan, tmp_path)
    assert "3 rows: 0 done, 3 waiting, 0 ended, 0 running, 0 failed" in said
    assert "time left: unknown; not yet measured:" in said and "2 generate_anchors" in said
    assert "No run of this checkout goes on" in said and "disk: 0 B" in said


def test_each_row_is_in_one_state(plan, tmp_path):
    finish(plan, "owl")
    write(log_of(plan, "ablate_concept", "duck"), "INFO x: step 1\n2026 INFO x: step 40 of 120\n")
    write(
        log_of(plan, "ablate_concept", "rocket"), "2026 CRITICAL root: RuntimeError: no memory\nTraceback\n"
    )
    write(tmp_path / ".snakemake/locks/0.output.lock", when=NOW - 3600)
    said = status_text(plan, tmp_path)
    assert "3 rows: 1 done, 0 waiting, 0 ended, 1 running, 1 failed" in said
    assert "running  duck: ablate_concept: 2026 INFO x: step 40 of 120" in said
    assert "failed  rocket: ablate_concept: 2026 CRITICAL root: RuntimeError: no memory" in said
    assert log_of(plan, "ablate_concept", "rocket") in said and "holds its lock" in said


def test_a_shared_stage_that_fails_fails_every_row_that_waits_for_it(plan, tmp_path):
    write(log_of(plan, "generate_anchors", "owl"), "CRITICAL root: x\n".replace("CRITICAL", "2026 CRITICAL"))
    assert "0 done, 1 waiting, 0 ended, 0 running, 2 failed" in status_text(plan, tmp_path)


def test_an_earlier_runs_failure_waits_for_this_run(plan, tmp_path):
    write(log_of(plan, "ablate_concept", "rocket"), "2026 CRITICAL root: x\n", NOW - 7200)
    write(tmp_path / ".snakemake/locks/0.output.lock", when=NOW - 3600)
    assert "0 done, 3 waiting, 0 ended, 0 running, 0 failed" in status_text(plan, tmp_path)


def test_without_a_run_an_old_log_was_a_killed_job_and_a_fresh_one_another_checkouts(plan, tmp_path):
    write(log_of(plan, "ablate_concept", "rocket"), "INFO x: step 3\n", NOW - 7200)
    write(log_of(plan, "ablate_concept", "duck"), "INFO x: step 4\n")
    said = status_text(plan, tmp_path)
    assert "1 waiting, 1 ended, 1 running, 0 failed" in said and "was killed, last: INFO x: step 3" in said
    assert "A run seems to go on in another checkout" in said


def test_a_job_that_a_signal_ended_did_not_fail(plan, tmp_path):
    last = "2026 ERROR concept_ablation.common.logs: ended by SIGTERM\n"
    write(log_of(plan, "ablate_concept", "rocket"), f"2026 INFO x: step 3\n{last}")
    said = status_text(plan, tmp_path)
    assert "2 waiting, 1 ended, 0 running, 0 failed" in said
    assert "ended  rocket: ablate_concept: was ended by SIGTERM (" in said


def test_a_result_that_was_removed_is_waited_for(plan, tmp_path):
    last = "2026 INFO concept_ablation.common.logs: the script is done\n"
    write(log_of(plan, "ablate_concept", "rocket"), last, NOW - 7200)
    assert "3 waiting, 0 ended, 0 running, 0 failed" in status_text(plan, tmp_path)


def test_control_characters_of_a_log_stay_out(plan, tmp_path):
    write(log_of(plan, "ablate_concept", "rocket"), "2026 CRITICAL root: \x1b[31mred\x07\n")
    assert "\x1b" not in status_text(plan, tmp_path)


def test_the_time_left_is_the_medians_times_what_is_missing_over_what_ran_at_once(plan, tmp_path):
    finish(plan, "owl"), finish(plan, "duck")
    (row,) = [row for row in plan.rows if row.concept.name == "rocket"]
    anchors = plan.specs["ablate_concept"][row.ablation]["anchors"]
    write(plan.path(plan.specs["generate_anchors"][anchors]["prompts"]))
    for stage, seconds in (("ablate_concept", 100), ("generate_anchors", 100), ("sample_ablated", 60)):
        for number in range(2):  # two side by side
            write(f"{plan.results}/benchmarks/{stage}/{number}.tsv", f"s\th:m:s\n{seconds}\tx\n", NOW)
    costs = read_costs(plan.results)
    assert costs.seconds == {"ablate_concept": 100, "generate_anchors": 100, "sample_ablated": 60}
    assert costs.at_once == pytest.approx(520 / 100)
    said = status_text(plan, tmp_path)
    assert "at least about 50 s, an estimate" in said  # (100 + 100 + 60) / 5.2
    assert "not yet measured: " in said and "3 sample_base" in said and "1 score_concept" in said


def test_a_finished_run_has_no_time_left_and_its_disk_told(plan, tmp_path):
    for name in ("owl", "duck", "rocket"):
        finish(plan, name)
    (tmp_path / "results" / "samples" / "more").write_bytes(b"0" * 5000)
    said = status_text(plan, tmp_path)
    assert "3 rows: 3 done" in said and "time left" not in said and "disk: 5.0 kB (samples 5.0 kB" in said


def test_durations():
    assert [duration(s) for s in (5, 90, 3700, 100_000)] == ["5 s", "2 min", "1 h 2 min", "1 d 3 h"]
