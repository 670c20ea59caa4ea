"""What a family can't do is said before anything runs: one line a row, with what is allowed."""

import json
from pathlib import Path

import pytest
import yaml

from concept_ablation.plan.checks import read_table
from concept_ablation.plan.graph import PlanError

FLOWS = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
CLASSES = {"sdxl": "StableDiffusionXLPipeline", **FLOWS}
ROW = "concept,kind,target,anchor,neighbors\nr2d2,object,r2d2,robot,bb8\n"


@pytest.fixture
def plan(tmp_path):
    """Plan a table of one row with a family's overlay and further settings; the model is a folder that names its class."""

    def make(name, cls=None, overlays=None, **settings):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "model_index.json").write_text(json.dumps({"_class_name": cls or CLASSES[name]}), "utf-8")
        (tmp_path / "one.csv").write_text(ROW, "utf-8")
        own = {
            "concepts": str(tmp_path / "one.csv"),
            "results": str(tmp_path / "results"),
            "model": {"path": str(model), "revision": None},
            **settings,
        }
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), "utf-8")
        shipped = ["config/sd14.yaml", f"config/{name}.yaml"] if overlays is None else overlays
        return read_table([*shipped, str(tmp_path / "own.yaml")])[1]

    return make


def refused(plan, *arguments, **settings):
    with pytest.raises(PlanError) as caught:
        plan(*arguments, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", CLASSES)
def test_the_shipped_overlays_plan_as_they_are(name, plan):
    spec = next(iter(plan(name).specs["ablate_concept"].values()))
    assert spec["training"]["preserve"] == ("distill" if name in FLOWS else "null-space")
    assert spec["training"]["detach_bos"] == (name not in FLOWS)


@pytest.mark.parametrize("name", CLASSES)
def test_the_shipped_overlays_pin_a_revision_and_say_what_was_not_run(name):
    text = Path(f"config/{name}.yaml").read_text("utf-8")
    model = yaml.safe_load(text)["model"]
    assert len(model["revision"]) == 40 and "Never run on the real weights here" in text
    assert "GB" in text and "hf download" in text


@pytest.mark.parametrize("name", FLOWS)
def test_what_needs_keys_and_values_that_are_linear_in_the_texts_encoding_is_refused(name, plan):
    for method in ("uce", "rece", "speed"):
        text = refused(plan, name, method={"name": method})
        assert (
            f"one.csv:2: method {method} needs keys and values that are linear in the text's encoding" in text
        )
        assert "(allowed: method" in text
    for settings in ({"preserve": "null-space"}, {"start": "uce"}):
        ((setting, value),) = settings.items()
        assert f"training.{setting} {value} needs keys and values" in refused(plan, name, training=settings)
    assert "training.detach_bos true needs a first token" in refused(
        plan, name, training={"detach_bos": True}
    )


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("how", ["closed-form", "uce", "joint"])
def test_so_are_bundles_that_need_them(name, how, plan):
    more = {"preserve": "null-space"} if how == "joint" else {}
    text = refused(plan, name, bundles={"how": how, "training": more, "all": "everything"})
    assert f"bundle 'everything': how {how}" in text and "linear in the text's encoding" in text
    if how == "joint":
        assert plan(name, bundles={"how": how, "all": "everything"}).bundles


def test_flux_has_no_guidance_to_lead_away_by(plan):
    for method in ("esd", "negative-prompt"):
        text = refused(plan, "flux", method={"name": method})
        assert (
            f"method {method} needs a prediction without a prompt to lead away from, and FLUX.1 has none"
            in text
        )
    assert "anchors.negative_target true needs" in refused(plan, "flux", anchors={"negative_target": True})
    assert plan("sd3", method={"name": "esd"}).rows and plan("sd3", method={"name": "negative-prompt"}).rows


@pytest.mark.parametrize("name", CLASSES)
def test_the_attack_by_words_needs_one_text_encoder(name, plan):
    text = refused(plan, name, evaluation={"attack": "prefix"})
    assert "evaluation.attack prefix needs one text encoder" in text and "(allowed: soft-prompt)" in text
    assert plan(name, evaluation={"attack": "soft-prompt"}).rows


@pytest.mark.parametrize("name", FLOWS)
def test_a_scheduler_of_another_family_is_refused_with_those_that_there_are(name, plan):
    text = refused(plan, name, evaluation={"sampler": {"scheduler": "ddim"}})
    assert "evaluation.sampler.scheduler ddim" in text and "(allowed: default, flow-euler)" in text
    assert "evaluation.sampler.scheduler flow-euler" in refused(
        plan, "sdxl", evaluation={"sampler": {"scheduler": "flow-euler"}}
    )


def test_all_that_a_row_asks_for_in_vain_is_one_line(plan):
    text = refused(plan, "sd3", overlays=["config/sd14.yaml"], preset="default")
    assert text.count("\n") == 1
    for part in ("training.preserve null-space", "training.detach_bos true", "scheduler"):
        assert part in text


def test_a_parameter_group_of_another_family_is_refused(plan):
    text = refused(plan, "sdxl", training={"parameter_group": "single-attn", "preserve": "distill"})
    assert (
        "Stable Diffusion XL has no parameter group single-attn (allowed: cross-attn, attn, full-weight"
        in text
    )
    assert plan("flux", training={"parameter_group": "single-attn"}).rows


def test_a_class_that_no_family_has_is_left_to_the_loading(plan):
    assert plan("sdxl", cls="SomeOtherPipeline").rows
