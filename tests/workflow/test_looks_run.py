"""Pictures as many as needed, on the embedded model: Snakemake draws a row in looks beside base pictures that are there already."""

import copy

import pyarrow.parquet as pq
import pytest
import yaml

from tests.workflow.conftest import HEADER, ROOT, SAMPLER

pytestmark = pytest.mark.workflow
OWL = "owl,object,owl,bird,duck,\n"
FIXED = {
    "prompts": {"count": 4},
    "anchors": {"images": 4, "sampler": SAMPLER},
    "training": {"steps": 2, "batch_size": 2, "preserve": "none", "strength": "fixed"},
    "evaluation": {
        "images": {"target": 12, "anchor": 12, "neighbor": 12},
        "sampler": SAMPLER,
        "statistics": {"bootstrap": 20},
    },
    "runtime": {"device": "cpu", "threads": 1},
}
UNTIL = {"half_width": 0.45, "decided": True, "look": 6}
REPORT = {"aggregate_attacks": 1, "aggregate_scores": 1, "render_report": 1}


@pytest.fixture(scope="module")
def drawn(make_checkout):
    """A checkout with the report of OWL, drawn in looks; what comes before was done with a fixed number of pictures."""
    checkout = make_checkout()
    (checkout.folder / "embedded").symlink_to(ROOT / "embedded")
    until = copy.deepcopy(FIXED)
    until["evaluation"]["until"] = UNTIL
    for name, overlay in (("fixed", FIXED), ("until", until)):
        (checkout.folder / f"{name}.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    checkout.write(HEADER + OWL)
    checkout.prepare(HEADER + OWL, but=("sample_ablated",), overlay="fixed.yaml")
    assert checkout.jobs("until.yaml") == {"sample_ablated": 1, "score_concept": 1, **REPORT}
    done = checkout.snakemake("--cores", "1", "--configfile", "until.yaml")
    assert done.returncode == 0, done.stdout
    return checkout


def test_scores_and_page_have_the_pictures_that_were_needed(drawn):
    results = drawn.folder / "results"
    (samples,) = results.glob("samples/*.parquet")
    rows = pq.read_table(samples, columns=["role", "index"]).to_pylist()
    counts = {role: sum(row["role"] == role for row in rows) for role in ("target", "anchor", "neighbor")}
    assert set(counts.values()) <= {6, 12} and counts["target"] == counts["anchor"]
    for line in pq.read_table(results / "report" / "scores.parquet").to_pylist():
        role = line["role"] if line["role"] in counts else "neighbor"
        assert (line["n"], line["looks"], line["looks_most"]) == (counts[role], counts[role] // 6, 2)
    assert "duck" in (results / "report" / "index.html").read_text(encoding="utf-8")


def test_a_run_again_does_nothing_and_a_fixed_number_draws_no_base_pictures(drawn):
    assert drawn.jobs("until.yaml") == {}
    assert drawn.jobs("fixed.yaml") == {"sample_ablated": 1, "score_concept": 1, **REPORT}
