"""The parts of a job's time in its log, and the table that bench/pipeline.py makes of a run."""

import os
from datetime import datetime

import pytest

from bench.pipeline import IDLE, OWN, free_cores, parts_of, read_run, tables
from concept_ablation.common import parts
from concept_ablation.common.logs import TOOK
from concept_ablation.common.parts import begin, read_spent, spent_text, timed

HEAD = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
START = datetime(2026, 1, 2, 3, 0, 0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])
    begin()

    def go_on(seconds):
        now[0] += seconds

    return go_on


def test_a_second_counts_to_the_innermost_part_alone(clock, tmp_path):
    @timed("scoring")
    def score():
        clock(2)

    clock(1)
    with timed("training"):
        clock(10)
        with timed("pictures"):
            clock(30)
            score()
        clock(5)
        with pytest.raises(KeyError), timed("loading"):
            clock(0.5)
            raise KeyError
        clock(5)
    (tmp_path / "job.log").write_text(f"2026-01-02 03:04:05,678 INFO x: {spent_text()}\n")
    told = read_spent(tmp_path / "job.log")
    assert told == {"start-up": 0, "loading": 0.5, "pictures": 30, "training": 20, "scoring": 2, "rest": 1}
    assert read_spent(tmp_path / "no.log") is None


def stamp(second):
    return f"[{datetime.fromtimestamp(START.timestamp() + second):%a %b %d %H:%M:%S %Y}]"


def started(rule, number, second, output, inputs=()):
    lines = [stamp(second), f"localrule {rule}:"]
    lines += [f"    input: {', '.join(inputs)}"] * bool(inputs)
    lines += [f"    output: {output}"] * bool(output) + [
        f"    log: logs/{number}.log",
        f"    jobid: {number}",
    ]
    return [*lines, f"    benchmark: benchmarks/{number}.tsv"]


@pytest.fixture
def run(tmp_path):
    """Two cores. Jobs 1 and 2 begin at 2, job 3 needs both and begins at 13, and the run ends at 21."""
    lines = ["Provided cores: 2", *started("sample_base", 1, 2, "a"), *started("sample_base", 2, 2, "b")]
    lines += [stamp(6), "Finished jobid: 1 (Rule: sample_base)"]
    lines += [stamp(12), "Finished jobid: 2 (Rule: sample_base)"]
    lines += [
        *started("score_concept", 3, 13, "c", ["a", "b"]),
        stamp(20),
        "Finished jobid: 3 (Rule: score_concept)",
    ]
    lines += [*started("all", 0, 20, "", ["c"]), stamp(20), "Finished jobid: 0 (Rule: all)"]
    lines += ["Elapsed time: 0:00:21.000000"]
    log = tmp_path / f"{START:%Y-%m-%dT%H%M%S}.000000.snakemake.log"
    log.write_text("\n".join(lines) + "\n")
    for number, seconds, ended in ((1, 4.0, 6), (2, 9.5, 12), (3, 7.0, 20)):
        file = tmp_path / f"benchmarks/{number}.tsv"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{HEAD}{seconds}\t0:00:01\t1\t1\t1\t1\t0\t0\t0\t0.1\n")
        os.utime(file, (START.timestamp() + ended,) * 2)
    (tmp_path / "logs").mkdir()
    told = (
        "x: spent 6.50 s: start-up 0.10, loading 1.00, pictures 0.00, training 0.00, scoring 5.00, rest 0.40"
    )
    (tmp_path / "logs/3.log").write_text(f"{told}\nx: {TOOK % (5.5, 700)}\n")
    return read_run(log, tmp_path)


def test_cores_that_no_job_has_are_idle_or_snakemakes(run):
    # Until 2 (job 2: 2.5) both could have started; from 6 to 12 nobody could, and 3 could from 12 to 13; then one core has nothing.
    # At the end the rule that asks for the files takes a core.
    assert free_cores(run) == {OWN: 2 + 2.5 + 1 + 1, IDLE: 6 + 1 + 7 + 1}


def test_a_run_is_the_sum_of_its_parts(run, tmp_path):
    found = [parts_of(job, tmp_path) for job in run.jobs if job.outputs]
    assert found[0] == {"pictures": 4} and found[1] == {"pictures": 9.5}, "the logs tell no parts"
    assert found[2] == pytest.approx(
        {"start-up": 0.6, "loading": 1, "pictures": 0, "training": 0, "scoring": 5, "rest": 0.4}
    )
    text = "\n".join(tables(run, tmp_path))
    assert "| sum (wall x cores: 42) | 42 | 100.0% |" in text
    assert "2 jobs whose logs don't tell parts" in text
    assert "| score_concept | 1 | 7 |" in text
