"""What every job cost, and what of it falls to each row."""

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import METADATA_KEY, write_store
from concept_ablation.common.logs import DONE, TOOK, read_took
from concept_ablation.common.run_id import VARIABLE, run_began, run_id, start_run
from concept_ablation.report.costs import aggregate_costs, read_costs_table, row_costs, stage_costs, total
from tests.shipped import report_spec
from tests.test_report import images

HEAD = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
BASE, OWN, TRAINED, WROTE = "sample_base/b.1", "sample_ablated/a.1", "ablate_concept/t.1", "write_prompts/p.1"


def measured(results, job, seconds, ended, took=None, memory="26.0", cpu="0.1"):
    file = results / "benchmarks" / f"{job}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{HEAD}{seconds}\t0:00:01\t{memory}\t1\t1\t1\t0\t0\t0\t{cpu}\n")
    os.utime(file, (ended, ended))
    if took:
        log = results / "logs" / f"{job}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(
            "".join(f"2026-01-02 03:04:05,678 INFO x: {text}\n" for text in ("host", TOOK % took, DONE))
        )


@pytest.fixture
def costs(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "20260102T030405Z-9f3a")
    began = run_began()
    assert began == 1767323045
    measured(tmp_path, BASE, 30.0, began - 100, took=(20.5, 800))
    measured(tmp_path, OWN, 12.0, began + 50, memory="-", cpu="NA")
    measured(tmp_path, TRAINED, 60.0, began, memory="900.5", cpu="55")
    write_store(
        tmp_path / "base/b.1.parquet",
        images(None, "owl", 3, "red", "a picture"),
        {"device": "cuda", "sampler": {"steps": 8}},
    )
    (tmp_path / "concepts/t.1").mkdir(parents=True)
    about = {METADATA_KEY: json.dumps({"device": "cpu"})}
    record = pa.table({"step": [1, 2], "loss": [0.1, 0.2]}).replace_schema_metadata(about)
    with atomic_output(tmp_path / "concepts/t.1/training.parquet") as part:
        pq.write_table(record, part)
    pq.write_table(pa.table({"pictures": [8, 16]}), tmp_path / "concepts/t.1/strength.parquet")
    spec = report_spec(
        [
            {"concept": "fox", "jobs": [BASE, OWN, TRAINED, WROTE]},
            {"concept": "owl", "jobs": [BASE]},
        ]
    )
    spec["bundles"] = [{"name": "all", "rows": [{"jobs": [BASE, "sample_ablated/c.1"]}], "jobs": []}]
    lines = aggregate_costs(spec, tmp_path, tmp_path / "report" / "costs.parquet")
    return tmp_path, {f"{line['stage']}/{line['key']}": line for line in lines}


def test_each_job_has_a_line_with_what_benchmark_log_and_results_say(costs):
    folder, lines = costs
    assert list(lines) == [WROTE, TRAINED, BASE, OWN, "sample_ablated/c.1"], "in the stages' order"
    base = lines[BASE]
    assert (base["rows"], base["bundles"]) == (["fox", "owl"], ["all"])
    assert (base["seconds"], base["cpu_seconds"], base["peak_memory_mb"]) == (30, 20.5, 800), (
        "the log's, for the job was warm"
    )
    assert (base["device"], base["pictures"], base["sampler_steps"], base["ran"]) == ("cuda", 3, 8, False)
    own = lines[OWN]
    assert (own["ran"], own["cpu_seconds"], own["peak_memory_mb"], own["pictures"]) == (
        True,
        None,
        None,
        None,
    )
    trained = lines[TRAINED]
    assert (trained["cpu_seconds"], trained["peak_memory_mb"], trained["device"]) == (55, 900.5, "cpu")
    assert (trained["training_steps"], trained["pictures"], trained["ran"]) == (2, 24, True)
    assert lines[WROTE]["seconds"] is lines[WROTE]["ran"] is lines[WROTE]["finished"] is None
    table = pq.read_table(folder / "report" / "costs.parquet")
    assert table.to_pylist() == list(lines.values()) == read_costs_table(folder / "report" / "costs.parquet")
    told = json.loads(table.schema.metadata[METADATA_KEY])["total"]
    assert told == {"jobs": 5, "ran": 2, "unmeasured": 2, "seconds": 102.0, "cpu_seconds": 75.5}
    text = list(csv.DictReader((folder / "report" / "costs.csv").open(encoding="utf-8")))
    assert [line["rows"] for line in text] == ["fox", "fox", "fox; owl", "fox", ""]


def test_shared_work_is_divided_among_the_rows_so_that_they_add_up(costs):
    _, lines = costs
    rows, stages = row_costs(lines.values()), stage_costs(lines.values())
    assert rows["fox"]["cost_seconds"] == 30 / 2 + 12 + 60 and rows["owl"]["cost_seconds"] == 15
    assert rows["fox"]["cost_own_seconds"] == 72 and rows["owl"]["cost_own_seconds"] == 0
    assert [rows["fox"][f"cost_jobs{end}"] for end in ("", "_ran", "_unmeasured")] == [4, 2, 1]
    everything = total(lines.values())
    for name in ("seconds", "cpu_seconds"):
        assert sum(row[f"cost_{name}"] for row in rows.values()) == pytest.approx(everything[name])
        assert sum(stage[name] for stage in stages.values()) == pytest.approx(everything[name])
    assert stages["sample_base"]["memory"] == 800 and stages["ablate_concept"]["pictures"] == 24


def test_a_run_has_a_name_that_says_when_it_began(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert run_id() is run_began() is None
    monkeypatch.setenv(VARIABLE, "x")  # so that it is taken back
    assert start_run() == run_id() and run_began() > 1767323045
    monkeypatch.setenv(VARIABLE, "something else")
    assert run_began() is None


def test_a_log_without_its_end_tells_no_cost(tmp_path):
    assert read_took(tmp_path / "no.log") is None
    (tmp_path / "cut.log").write_text("2026-01-02 03:04:05,678 INFO x: took 1.0 CPU s, and 5")
    assert read_took(tmp_path / "cut.log") is None
