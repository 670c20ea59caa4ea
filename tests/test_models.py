import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_tiny_pipeline

from concept_ablation.models import (
    DeltaError,
    ModelError,
    apply_delta,
    cross_attentions,
    load_delta,
    load_pipeline,
    save_delta,
    trainable_parameters,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def test_load_pipeline_gives_fp32_weights_whatever_was_saved(folder, tmp_path):
    half = tmp_path / "half"
    load_pipeline(folder, device="cpu").to(torch.float16).save_pretrained(half)
    pipeline = load_pipeline(half, device="cpu")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {value.dtype for value in part.parameters()} == {torch.float32}
        assert not part.training
    assert pipeline.safety_checker is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder", "no such folder"),
        ("./folder", "no such folder"),
        ("folder", "no such folder"),
        ("{tmp}/sub", "no such folder"),
        ("{tmp}", "no model_index.json"),
    ],
)
def test_load_pipeline_says_what_is_wrong_with_a_path(path, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load_pipeline(path.format(tmp=tmp_path))


def test_load_pipeline_names_a_damaged_model(folder, tmp_path):
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(ModelError, match=f"{tmp_path}: not a StableDiffusionPipeline that loads"):
        load_pipeline(tmp_path, device="cpu")


def test_parameter_groups(pipeline):
    groups = {
        name: trainable_parameters(pipeline.unet, name) for name in ("cross-attn", "attn", "full-weight")
    }
    layers = cross_attentions(pipeline.unet)
    assert set(groups["cross-attn"]) == {
        f"{name}.{part}.weight" for name in layers for part in ("to_k", "to_v")
    }
    # Each layer: q, k, v without bias, an output with bias; as many self-attention as cross-attention layers.
    assert len(groups["attn"]) == 2 * len(layers) * 5
    assert len(groups["full-weight"]) == len(list(pipeline.unet.parameters()))
    with pytest.raises(ModelError, match="allowed: cross-attn, attn, full-weight"):
        trainable_parameters(pipeline.unet, "crossattn")


def test_group_sizes_on_stable_diffusion_1():
    """32, 160 and 686 tensors; 19,169,280 and 859,520,964 numbers, as in Stable Diffusion 1.4."""
    from diffusers.models import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    sizes = {name: trainable_parameters(unet, name) for name in ("cross-attn", "attn", "full-weight")}
    assert [len(group) for group in sizes.values()] == [32, 160, 686]
    assert sum(value.numel() for value in sizes["cross-attn"].values()) == 19_169_280
    assert sum(value.numel() for value in sizes["full-weight"].values()) == 859_520_964


def test_delta_round_trip(pipeline, folder, tmp_path):
    before = {name: value.clone() for name, value in pipeline.unet.named_parameters()}
    changed = {
        f"unet.{name}": value + 1 for name, value in trainable_parameters(pipeline.unet, "cross-attn").items()
    }
    metadata = {"base_model": str(folder), "seed": 3, "settings": {"steps": 2, "max_grad_norm": None}}
    save_delta(tmp_path / "delta.safetensors", changed, metadata)
    assert load_delta(tmp_path / "delta.safetensors")[1] == metadata
    assert apply_delta(pipeline, tmp_path / "delta.safetensors") == metadata
    for name, value in pipeline.unet.named_parameters():
        expected = before[name] + 1 if f"unet.{name}" in changed else before[name]
        assert torch.equal(value, expected)


def test_delta_keeps_fp32(tmp_path):
    value = torch.tensor([1 + 2**-20])
    save_delta(tmp_path / "d.safetensors", {"unet.a": value}, {})
    assert torch.equal(load_delta(tmp_path / "d.safetensors")[0]["unet.a"], value)


def test_delta_of_another_model_is_refused_and_changes_nothing(pipeline, tmp_path):
    path = tmp_path / "d.safetensors"
    name, value = next(iter(trainable_parameters(pipeline.unet, "cross-attn").items()))
    before = value.clone()
    for tensors in (
        {f"unet.{name}": value + 1, "unet.other": value},
        {f"unet.{name}": value[:1]},
        {f"scheduler.{name}": value},
    ):
        save_delta(path, tensors, {"base_model": "sd"})
        with pytest.raises(DeltaError, match="1 of . parameters don't fit this model.*'sd'"):
            apply_delta(pipeline, path)
    assert torch.equal(value, before)


def test_damaged_deltas_are_named(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(DeltaError, match="d.safetensors: can't be read"):
        load_delta(path)
    path.write_bytes(b"damaged")
    with pytest.raises(DeltaError, match="d.safetensors: can't be read"):
        load_delta(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(DeltaError, match="no delta of this project"):
        load_delta(path)
    save_file({"a": torch.ones(1)}, path, {"concept_ablation": json.dumps({})[:-1]})
    with pytest.raises(DeltaError, match="can't be read"):
        load_delta(path)


def test_a_hub_id_is_never_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hf download someone/some-model"):
        load_pipeline("someone/some-model", "0" * 40, "cpu")
