"""The defaults as they are shipped, on the embedded model: a null space, and a strength that is searched; counts are small."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from tests.workflow.conftest import HEADER, ROOT, SAMPLER, SEARCH

pytestmark = pytest.mark.workflow
OWL = "owl,object,owl,bird,duck,\n"
OVERLAY = {
    "prompts": {"count": 4},
    "anchors": {"images": 4, "sampler": SAMPLER},
    "training": {
        "steps": 2,
        "batch_size": 2,
        "search": {**SEARCH, "ladder": [{"preserve_tolerance": 1e-2}]},
    },
    "evaluation": {
        "images": {"target": 4, "anchor": 4, "neighbor": 4},
        "sampler": SAMPLER,
        "statistics": {"bootstrap": 20},
    },
    "runtime": {"device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def searched(make_checkout):
    """A checkout with the report of the row OWL, whose work was done in this process: a job takes seconds to start."""
    checkout = make_checkout()
    (checkout.folder / "embedded").symlink_to(ROOT / "embedded")
    (checkout.folder / "embedded.yaml").write_text(yaml.safe_dump(OVERLAY), encoding="utf-8")
    checkout.write(HEADER + OWL)
    checkout.prepare(HEADER + OWL, but=(), overlay="embedded.yaml")
    done = checkout.snakemake("--cores", "1", "--configfile", "embedded.yaml")
    assert done.returncode == 0, done.stdout
    return checkout


def test_a_training_writes_its_looks_and_the_report_shows_them(searched):
    results = searched.folder / "results"
    (file,) = results.glob("concepts/*/strength.parquet")
    looks = pq.read_table(file).to_pylist()
    assert [look["chosen"] for look in looks].count(True) == 1 and looks[0]["step"] == 1
    assert {json.loads(look["settings"])["preserve_tolerance"] for look in looks} == {1e-2}
    (line,) = pq.read_table(results / "report" / "summary.parquet").to_pylist()
    assert line["strength_looks"] == len(looks) and line["validation_pictures"] >= 4
    assert line["strength_found"] is not None
    page = (results / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h3>Strength</h3>" in page and "preserve tolerance 0.01" in page


def test_other_neighbors_train_anew_and_draw_no_anchors(searched):
    searched.write(HEADER + OWL.replace("duck", "penguin"))
    jobs = searched.jobs("embedded.yaml")
    searched.write(HEADER + OWL)
    assert jobs["ablate_concept"] == 1 and "generate_anchors" not in jobs
    assert searched.jobs("embedded.yaml") == {}
