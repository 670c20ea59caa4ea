"""A look at a model on validation pictures: what it says of an unchanged, of a ruined and of a model that has lost its target."""

import contextlib
from pathlib import Path

import pytest
import torch

from concept_ablation.common.settings import merge
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.evaluation.validation import Spending, Validation
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan

ROOT = Path(__file__).parents[1]
FEW = {"images": {"target": 16, "anchor": 6, "neighbor": 6}, "batches": 3}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The ablation of an owl, judged on few pictures."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "concepts.csv").write_text("kind,target,anchor,neighbors\nobject,owl,bird,penguin; parrot\n")
    config = read_config(ROOT / "config" / "config.yaml")
    merge(config, {"concepts": str(folder / "concepts.csv"), "training": {"search": FEW}})
    with contextlib.chdir(ROOT):
        return load_plan(config, ROOT / "workflow" / "schemas", "config")[1]


@pytest.fixture
def validation(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = plan.specs["ablate_concept"][plan.rows[0].ablation]
    return Validation(spec, load_pipeline(spec["model"]["path"], device="cpu"))


def test_an_unchanged_model_still_has_its_target(validation):
    found = validation.look(Spending(0.05))
    assert found.target_share > 0.8 and not found.gone
    assert found.kept is None and found.anchor_loss is None  # so nothing else was drawn
    assert found.pictures == 16


def test_a_ruined_model_has_lost_its_target_and_everything_else(validation):
    """Whatever it is asked for, it draws noise: no owl, no bird, no penguin."""
    layer = validation.pipeline.unet.conv_out
    whole = layer.weight.detach().clone()

    @contextlib.contextmanager
    def unchanged():
        with torch.no_grad():
            layer.weight.copy_(whole)
            yield
            layer.weight.zero_()

    validation.unchanged = unchanged
    with torch.no_grad():
        layer.weight.zero_()
    found = validation.look(Spending(0.05))
    assert found.gone and found.kept is False
    assert found.worst_neighbor_loss > 0.5 and found.anchor_loss > 0.5 and found.excess > 0


def test_the_pictures_are_not_the_reports(plan):
    row = plan.rows[0]
    probes = {
        stage: {probe["subject"]: probe for probe in spec["probes"]}
        for stage, spec in (
            ("report", plan.specs["sample_ablated"][row.samples]),
            ("validation", plan.specs["ablate_concept"][row.ablation]["validation"]),
        )
    }
    training = (ROOT / "config/prompts/object.txt").read_text()
    for subject, own in probes["validation"].items():
        report = probes["report"][subject]
        assert not set(own["prompts"]) & set(report["prompts"])
        assert not any(prompt.replace(subject, "{subject}") in training for prompt in own["prompts"])
        seeds = [range(probe["seed"], probe["seed"] + probe["images"]) for probe in (own, report)]
        assert not set(seeds[0]) & set(seeds[1])
