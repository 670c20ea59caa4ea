"""Every kind of row, group, loss and preset goes through every stage; the tiny models' scores mean nothing here."""

import pyarrow.parquet as pq
import pytest
import yaml

from tests.workflow.conftest import SMALL

pytestmark = pytest.mark.workflow
HEADER = (
    "concept,kind,target,anchor,neighbors,preset,parameter_group,loss,steps,batch_size,anchor_images,anchors.sampler.steps,"
    "training.prior_preservation\n"
)
ROWS = {
    "two-styles": "style,ink; pencil,picture,neon,,,,2,2,4,2,",
    "paper": "style,ink,picture,neon,paper,,,2,2,4,2,yes",
    "diffusers": "style,pencil,picture,neon,diffusers,,,2,2,4,2,yes",
    "unsafe": "inappropriate,angry,face,robot; ghost,,,,2,2,4,2,",
    "all-weights": "object,pouting cat,cat,weary cat,,full-weight,noise-based,2,2,4,2,",
    "tokens": "object,pouting cat,cat,weary cat,,embedding,,2,2,4,2,",
}


@pytest.fixture(scope="module")
def run(make_checkout):
    checkout = make_checkout()
    checkout.write(HEADER + "".join(f"{name},{row}\n" for name, row in ROWS.items()))
    done = checkout.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    return checkout


@pytest.fixture(scope="module")
def summary(run):
    lines = pq.read_table(run.folder / "results" / "report" / "summary.parquet").to_pylist()
    return {line["concept"]: line for line in lines}


def test_every_row_is_in_the_report(run, summary):
    assert summary.keys() == ROWS.keys()
    page = (run.folder / "results" / "report" / "index.html").read_text()
    assert all(name in page for name in ROWS)


def test_each_of_two_targets_is_scored_alone_and_together(run):
    scores = pq.read_table(run.folder / "results" / "report" / "scores.parquet").to_pylist()
    found = {(line["role"], line["probe"]) for line in scores if line["concept"] == "two-styles"}
    assert {("target", "ink"), ("target", "pencil")} <= found and any(role == "targets" for role, _ in found)


def test_an_unsafe_row_is_judged_by_its_detector(run, summary):
    assert summary["unsafe"]["measure"] == "detected" and summary["paper"]["measure"] == "clip_accuracy"
    (store,) = (run.folder / "results" / "anchors").glob("inappropriate-face.*.parquet")
    assert b'"negative_prompt": "angry"' in pq.read_metadata(store).metadata[b"concept_ablation"]


def test_a_presets_settings_are_in_the_delta_and_a_column_replaces_them(run, summary):
    from concept_ablation.models import load_delta

    for name, wanted in (
        (
            "paper",
            {
                "scale_lr": "compvis",
                "prior_form": "halved",
                "prior_weight": 0.2,
                "max_grad_norm": None,
                "steps": 2,
            },
        ),
        (
            "diffusers",
            {"scale_lr": "diffusers", "prior_form": "doubled", "mask_border": True, "batch_size": 2},
        ),
        ("two-styles", {"scale_lr": "none", "prior_preservation": False}),
    ):
        _, metadata = load_delta(run.folder / summary[name]["delta"])
        assert metadata["settings"].items() >= wanted.items(), name


def test_a_delta_of_the_published_form_is_judged_as_a_row(run, summary):
    from concept_ablation.formats import export_delta

    export_delta(run.folder / summary["paper"]["delta"], "delta-bin", run.folder / "their.bin")
    rows = "concept,kind,target,anchor,neighbors,delta\ntheirs,style,ink,picture,neon,their.bin\n"
    run.write(rows, "theirs.csv")
    (run.folder / "theirs.yaml").write_text(
        yaml.safe_dump({**SMALL, "concepts": "theirs.csv", "results": "results"})
    )
    done = run.snakemake("--cores", "2", "--configfile", "theirs.yaml")
    assert done.returncode == 0 and "ablate_concept" not in done.stdout, done.stdout
    (line,) = pq.read_table(run.folder / "results" / "report" / "summary.parquet").to_pylist()
    for column in ("target_accuracy_ablated", "target_kid_x1000", "neighbor_recognition_ablated"):
        assert line[column] == pytest.approx(summary["paper"][column]), "the same weights, the same pictures"
