"""Method `negative-prompt`: how a row without weights is sampled, measured and refused where a model is asked for."""

import logging

import numpy as np
import pytest
import yaml
from tiny import make_tiny_pipeline

from concept_ablation import apply_delta, load_delta, load_pipeline
from concept_ablation.common.image_store import read_store
from concept_ablation.diffusion.delta_export import export_delta
from concept_ablation.diffusion.delta_import import FormatError
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import sample_ablated
from concept_ablation.methods.negative_prompt import METHOD
from concept_ablation.methods.stage import ablate_concept
from concept_ablation.report.card import CardError, write_card

SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 3.0, "eta": 0.0, "precision": "fp32"}
SAMPLER |= {"height": None, "width": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("negative"))


@pytest.fixture(scope="module")
def delta(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("row")
    row = {"kind": "object", "targets": ["owl", "eagle"], "anchor": "bird", "templates": [], "settings": {}}
    spec = {"stage": "ablate_concept", "method": METHOD.name, **row}
    spec["model"] = {"path": str(folder), "revision": None}
    files = {"delta": out / "d.safetensors", "training": out / "t.parquet", "strength": out / "s.parquet"}
    ablate_concept(spec, **files, device="cpu")
    return files["delta"]


def test_the_delta_holds_no_weights_and_says_how_its_pictures_are_drawn(folder, delta, caplog):
    tensors, metadata = load_delta(delta)
    assert not tensors and metadata["sampling"] == {"negative_prompt": "owl, eagle"}
    pipeline = load_pipeline(folder, device="cpu")
    with caplog.at_level(logging.WARNING):
        apply_delta(pipeline, delta)
    assert "are to be drawn with {'negative_prompt': 'owl, eagle'}" in caplog.text


def test_its_pictures_are_drawn_with_the_targets_as_negative_prompt(folder, delta, tmp_path):
    probe = {"role": "neighbor", "subject": "duck", "prompts": ["a duck"], "images": 2, "seed": 5}
    spec = {"model": {"path": str(folder), "revision": None}, "sampler": SAMPLER, "probes": [probe]}
    sample_ablated(spec, delta, tmp_path / "s.parquet", device="cpu")
    pipeline = load_pipeline(folder, device="cpu")
    options = {"sampler": SAMPLER, "batch_size": 2}
    led, plain = (
        [np.asarray(image) for image in sample_images(pipeline, ["a duck"] * 2, [5, 6], **options, **more)]
        for more in ({"negative_prompt": "owl, eagle"}, {})
    )
    found = [np.asarray(image) for image in read_store(tmp_path / "s.parquet").images()]
    assert np.array_equal(found, led) and not np.array_equal(found, plain)


def test_where_a_model_is_asked_for_it_says_that_there_is_none(delta, tmp_path):
    with pytest.raises(FormatError, match=r"changes no weights, so there is no model to export; .*owl, eagle"):  # fmt: skip
        export_delta(delta, tmp_path / "out", "lora")
    with pytest.raises(CardError, match="changes no weights, so there is no model for a card"):
        write_card(tmp_path / "card", {}, [], delta, None, {})


def test_without_guidance_and_in_a_bundle_of_deltas_it_is_refused(tmp_path, monkeypatch):
    from pathlib import Path

    from concept_ablation.plan.graph import PlanError
    from concept_ablation.plan.specs import load_plan

    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    config = yaml.safe_load((root / "config" / "config.yaml").read_text(encoding="utf-8"))
    head = "kind,target,anchor,neighbors,method,bundle,evaluation.sampler.guidance_scale\n"
    table = tmp_path / "concepts.csv"
    table.write_text(head + "object,owl,bird,duck,negative-prompt,,1\nobject,fox,animal,dog,negative-prompt,all,3\nobject,bee,bug,snail,uce,all,3\n")  # fmt: skip
    config |= {"concepts": str(table), "results": str(tmp_path / "results")}
    with pytest.raises(PlanError) as caught:
        load_plan(config, root / "workflow" / "schemas", "config/config.yaml")
    text = str(caught.value)
    assert "guidance_scale is 1" in text and "(allowed: above 1)" in text
    assert "method negative-prompt changes no weights, so there is nothing to merge" in text
