"""A look at a model on validation pictures: what it says of an unchanged, of a ruined and of a model that has lost its target."""

from pathlib import Path

import pytest
import torch

from concept_ablation.common.settings import merge
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.evaluation.validation import Spending, Validation
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan

ROOT = Path(__file__).parents[1]
FEW = {"images": {"target": 16, "anchor": 6, "neighbor": 6}, "batches": 2}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """The ablation of an owl, judged on few pictures."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "concepts.csv").write_text("kind,target,anchor,neighbors\nobject,owl,bird,penguin; parrot\n")
    config = read_config(ROOT / "config" / "config.yaml")
    merge(config, {"concepts": str(folder / "concepts.csv"), "training": {"search": FEW}})
    _, plan = load_plan(config, ROOT / "workflow" / "schemas", "config")
    return plan.specs["ablate_concept"][plan.rows[0].ablation]


@pytest.fixture
def validation(spec, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Validation(spec, load_pipeline(spec["model"]["path"], device="cpu"))


def test_an_unchanged_model_still_has_its_target(validation):
    found = validation.look(Spending(0.05))
    assert found.target_share > 0.8 and not found.gone
    assert found.kept is None and found.anchor_loss is None  # so nothing else was drawn
    assert found.pictures == 16


def test_a_ruined_model_has_lost_its_target_and_everything_else(validation, spec):
    """Text says nothing to it any more: what it draws is neither an owl nor a penguin."""
    untouched = {name: value.clone() for name, value in validation.pipeline.unet.state_dict().items()}

    class Unchanged:
        def __enter__(self):
            self.ruined = {
                name: value.clone() for name, value in validation.pipeline.unet.state_dict().items()
            }
            validation.pipeline.unet.load_state_dict(untouched)

        def __exit__(self, *_):
            validation.pipeline.unet.load_state_dict(self.ruined)

    validation.unchanged = Unchanged
    with torch.no_grad():
        for layer in ("conv_in", "conv_out"):
            getattr(validation.pipeline.unet, layer).weight.zero_()
    found = validation.look(Spending(0.05))
    if not found.gone:  # grey pictures may lie nearer to either text; then it is not shown to be gone
        pytest.skip("the scorer takes grey pictures for the target")
    assert found.kept is False and found.worst_neighbor_loss > 0.5 and found.anchor_loss > 0.5
    assert found.excess > 0


def test_the_pictures_are_not_the_reports(spec):
    config = read_config(ROOT / "config" / "config.yaml")
    report = [
        line
        for line in (ROOT / "config/prompts/eval/object.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    own = {prompt for probe in spec["validation"]["probes"] for prompt in probe["prompts"]}
    assert not own & {line.format(subject="owl", colour="red") for line in report}
    last = config["evaluation"]["seed"] + 1000 * 1_000_000
    assert config["training"]["search"]["seed"] > config["anchors"]["seed"] + config["anchors"]["images"]
    seeds = {probe["seed"] for probe in spec["validation"]["probes"]}
    assert len(seeds) == len(spec["validation"]["probes"]) and last > 0
