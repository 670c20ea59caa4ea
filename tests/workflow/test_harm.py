"""Who harms whom in Snakemake: what a run of several rows measures, and what a new row or a lost file measures again."""

import copy

import pyarrow.parquet as pq
import pytest
import yaml

from tests.workflow.conftest import HEADER, SMALL

pytestmark = pytest.mark.workflow
ROWS = HEADER + "cat,object,pouting cat,cat,weary cat,\nink,style,ink,picture,,\n"
NEW = "new,object,grinning cat,cat,weary cat,\n"
REPORT = {"aggregate_interference": 1, "aggregate_scores": 1, "render_report": 1}


@pytest.fixture(scope="module")
def measured(make_checkout):
    """A checkout with the report of two rows, each measured on all of the other's subjects."""
    checkout, own = make_checkout(), copy.deepcopy(SMALL)
    own["evaluation"]["interference"] = "all"
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    checkout.write(ROWS)
    checkout.prepare(ROWS, but=("measure_interference",))
    assert checkout.jobs("small.yaml") == {"measure_interference": 2, **REPORT}
    done = checkout.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    assert "Who harms whom: " in done.stdout, "the terminal says how it came out"
    return checkout


def test_the_report_has_every_pair(measured):
    report = measured.folder / "results" / "report"
    lines = pq.read_table(report / "interference.parquet").to_pylist()
    pairs = {(line["concept"], line["victim"], line["role"]) for line in lines}
    cats = {("ink", "pouting cat", "target"), ("ink", "weary cat", "neighbor")}
    assert pairs == {("cat", "ink", "target"), *cats}
    assert {line["n"] for line in lines} == {4}
    assert "Who harms whom" in (report / "index.html").read_text(encoding="utf-8")
    assert measured.jobs("small.yaml") == {}


def test_a_new_row_is_measured_with_the_others_and_trains_itself_alone(measured):
    measured.write(ROWS + NEW)
    jobs = measured.jobs("small.yaml")
    measured.write(ROWS)
    own = {"sample_base": 1, "ablate_concept": 1, "sample_ablated": 1, "score_concept": 1}
    assert jobs == {**own, "measure_interference": 3, **REPORT}


def test_a_lost_table_is_measured_again_and_nothing_else(measured):
    table = min((measured.folder / "results" / "interference").glob("cat.*"), key=lambda file: len(file.name))
    content = table.read_bytes()
    table.unlink()
    jobs = measured.jobs("small.yaml")
    table.write_bytes(content)
    assert jobs == {"measure_interference": 1, **REPORT}


def test_a_row_whose_measuring_fails_is_in_the_report_all_the_same(measured):
    (table,) = (
        file for file in (measured.folder / "results/interference").glob("cat.*") if "images" not in file.name
    )
    kept, (base,) = table.read_bytes(), (measured.folder / "results/base").glob("style-ink.*")
    pictures = base.read_bytes()
    table.unlink()
    base.write_bytes(pictures[:100])
    done = measured.snakemake("--cores", "1", "--configfile", "small.yaml")
    table.write_bytes(kept)
    base.write_bytes(pictures)
    assert done.returncode != 0 and "measure_interference failed, for cat" in done.stdout, done.stdout
    concepts = pq.read_table(measured.folder / "results/report/summary.parquet")["concept"].to_pylist()
    assert "cat" in concepts
