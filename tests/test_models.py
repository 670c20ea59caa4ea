import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny import make_tiny_pipeline

from concept_ablation.diffusion.delta import DeltaError, apply_delta, load_delta, save_delta
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import ModelError, load_pipeline


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
        name: FAMILY.trainable_parameters(pipeline.unet, name)
        for name in ("cross-attn", "attn", "full-weight")
    }
    layers = FAMILY.text_projections(pipeline.unet)
    assert set(groups["cross-attn"]) == {f"{name}.weight" for name in layers}
    # Each layer: q, k, v without bias, an output with bias; as many self-attention as cross-attention layers.
    assert len(groups["attn"]) == len(layers) * 5
    assert len(groups["full-weight"]) == len(list(pipeline.unet.parameters()))
    with pytest.raises(ModelError, match="allowed: cross-attn, attn, full-weight"):
        FAMILY.trainable_parameters(pipeline.unet, "crossattn")


def test_group_sizes_on_stable_diffusion_1():
    """32, 160 and 686 tensors; 19,169,280 and 859,520,964 numbers, as in Stable Diffusion 1.4."""
    from diffusers.models import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    sizes = {name: FAMILY.trainable_parameters(unet, name) for name in ("cross-attn", "attn", "full-weight")}
    assert [len(group) for group in sizes.values()] == [32, 160, 686]
    assert sum(value.numel() for value in sizes["cross-attn"].values()) == 19_169_280
    assert sum(value.numel() for value in sizes["full-weight"].values()) == 859_520_964


def test_delta_round_trip(pipeline, folder, tmp_path):
    before = {name: value.clone() for name, value in pipeline.unet.named_parameters()}
    changed = {
        f"unet.{name}": value + 1
        for name, value in FAMILY.trainable_parameters(pipeline.unet, "cross-attn").items()
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
    name, value = next(iter(FAMILY.trainable_parameters(pipeline.unet, "cross-attn").items()))
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


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """The tiny pipeline in one file."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    return write_single_file(load_pipeline(folder, device="cpu"), path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_checkpoint_in_one_file_is_the_same_model(name, pipeline, folder, tmp_path):
    path = write_single_file(pipeline, tmp_path / name)
    found = load_pipeline(path, device="cpu", config=str(folder))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(model, part).state_dict() for model in (pipeline, found))
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found.safety_checker is None
    assert found.scheduler.config == pipeline.scheduler.config


def test_a_checkpoint_in_one_file_takes_its_config_from_the_cache(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="Nothing is downloaded in a run: give as its config"):
        load_pipeline(checkpoint, device="cpu")
    cached = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(folder)
    assert load_pipeline(checkpoint, device="cpu").unet.config.layers_per_block == 1


def test_a_checkpoint_in_one_file_takes_its_original_yaml(pipeline, folder, tmp_path, monkeypatch):
    """The .yaml tells the sizes; groups of 32 channels are all that CompVis's code knows. The rest is the cache's."""
    from diffusers.models import AutoencoderKL, UNet2DConditionModel

    own = pipeline.unet.config
    blocks = {name: own[name] for name in ("down_block_types", "up_block_types", "block_out_channels")}
    pipeline.unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, **blocks
    )
    vae = {name: pipeline.vae.config[name] for name in ("down_block_types", "up_block_types")}
    pipeline.vae = AutoencoderKL(
        sample_size=64, layers_per_block=1, block_out_channels=(32, 32, 32, 64), **vae
    )
    path = write_single_file(pipeline, tmp_path / "model.safetensors")
    unet = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
    }
    unet |= {"attention_resolutions": [2], "num_res_blocks": 1, "num_heads": 4, "context_dim": 32}
    unet |= {"use_spatial_transformer": True, "transformer_depth": 1}
    image = {
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 2],
    }
    stages = {"unet_config": {"params": unet}}
    stages["first_stage_config"] = {"params": {"embed_dim": 4, "ddconfig": image | {"num_res_blocks": 1}}}
    original = {"model": {"params": {"scale_factor": 0.18215, **stages}}}
    (tmp_path / "original.yaml").write_text(json.dumps(original))  # JSON is YAML
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(folder)
    found = load_pipeline(path, device="cpu", config=str(tmp_path / "original.yaml"))
    for part in ("unet", "vae"):
        ours, theirs = (getattr(model, part).state_dict() for model in (pipeline, found))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.diffusion_model.out.2", "some of the model's weights are missing"),
        ("first_stage_model.", "not a checkpoint .* Failed to load AutoencoderKL"),
        ("cond_stage_model.", "not a checkpoint .* Failed to load CLIPTextModel"),
    ],
)
def test_an_incomplete_checkpoint_in_one_file_is_refused(missing, message, checkpoint, folder, tmp_path):
    tensors = {name: value for name, value in load_file(checkpoint).items() if not name.startswith(missing)}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ModelError, match=message):
        load_pipeline(tmp_path / "part.safetensors", device="cpu", config=str(folder))


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(folder, tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    torch.save({"state_dict": Touch()}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match="refused, nothing in it was run: opening it would call .*open"):
        load_pipeline(tmp_path / "model.ckpt", device="cpu", config=str(folder))
    assert not (tmp_path / "touched").exists()


def test_a_config_that_does_not_serve_is_named(checkpoint, folder, tmp_path):
    other = make_tiny_pipeline(tmp_path / "other", vae_factor=4)
    with pytest.raises(ModelError, match="not a checkpoint .* expected shape"):
        load_pipeline(checkpoint, device="cpu", config=str(other))
    with pytest.raises(ModelError, match="config /no/where is neither a folder nor a file"):
        load_pipeline(checkpoint, device="cpu", config="/no/where")
    with pytest.raises(ModelError, match="no model_index.json"):
        load_pipeline(checkpoint, device="cpu", config=str(tmp_path))
    with pytest.raises(ModelError, match="for a checkpoint in one file alone"):
        load_pipeline(folder, device="cpu", config=str(folder))
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ModelError, match="ends in .safetensors or .ckpt"):
        load_pipeline(tmp_path / "model.txt", device="cpu", config=str(folder))
