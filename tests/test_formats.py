"""Deltas in other programs' forms: written, opened by the library they are for, and read back."""

import hashlib
import json
import os

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_pipeline

from concept_ablation.diffusion.compvis import LayoutError, compvis_names
from concept_ablation.diffusion.delta import DeltaError, apply_delta, load_delta, save_delta, token_row_name
from concept_ablation.diffusion.delta_export import export_delta
from concept_ablation.diffusion.delta_import import FormatError, import_delta, import_delta_stage
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.lora import LoraError, factorise
from concept_ablation.diffusion.pipeline import load_pipeline

GROUPS = ("cross-attn", "attn", "full-weight", "embedding")
TOKENS = (70, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def deltas(folder, tmp_path_factory):
    """Group -> a delta that moves each of its parameters a little."""
    pipeline, made, where = load_pipeline(folder, device="cpu"), {}, tmp_path_factory.mktemp("deltas")
    draw = torch.Generator().manual_seed(1)
    for group in GROUPS:
        own = {f"unet.{n}": p for n, p in FAMILY.trainable_parameters(pipeline.unet, group).items()}
        if group == "embedding":
            rows = pipeline.text_encoder.get_input_embeddings().weight
            own = {token_row_name("text_encoder", token): rows[token] for token in TOKENS}
        tensors = {
            name: value.detach() + 0.02 * _change(value.shape, draw, number)
            for number, (name, value) in enumerate(own.items())
        }
        made[group] = where / f"{group}.safetensors"
        metadata = {"base_model": str(folder), "base_revision": None, "group": group, "targets": ["owl"]}
        save_delta(made[group], tensors, metadata)
    return made


def _change(shape, draw, number):
    """Noise whose spectrum falls at another pace in each layer, so that layers need different ranks."""
    noise = torch.randn(shape, generator=draw)
    if len(shape) > 1:
        flat = noise.flatten(1)
        flat *= (0.5, 0.7, 0.9)[number % 3] ** torch.arange(flat.shape[1])
    return noise


@torch.no_grad()
def predict(pipeline, prompt="an owl"):
    """The noise prediction for a prompt, on fixed latents."""
    text = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    size = pipeline.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(latents, 500, text).sample


def predictions(folder, delta):
    """Of the base model, and of the model with a delta."""
    pipeline = load_pipeline(folder, device="cpu")
    base = predict(pipeline)
    apply_delta(pipeline, delta)
    return base, predict(pipeline)


# CompVis's names


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers_per_block": 1, "block_out_channels": (32, 64)},
        {"layers_per_block": (1, 3, 2), "block_out_channels": (32, 64, 96)},
        {"attention": (False, True, True), "block_out_channels": (32, 64, 96), "layers_per_block": 3},
    ],
)
def test_compvis_names_are_those_that_diffusers_reads(config):
    config = dict(config)
    blocks = len(config.get("block_out_channels", (0,) * 4))
    attention = config.pop("attention", (True,) * (blocks - 1) + (False,))
    down = tuple("CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attention)
    up = tuple("CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention))
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=down,
            up_block_types=up,
            **config,
        )
    ours = [name for name, _ in unet.named_parameters()]
    names = compvis_names(ours, unet.config)
    assert len(set(names.values())) == len(ours)
    if isinstance(config.get("layers_per_block", 2), int):
        back = convert_ldm_unet_checkpoint(
            {theirs: name for name, theirs in names.items()}, dict(unet.config)
        )
        assert back == {name: name for name in ours}


def test_compvis_names_of_stable_diffusion_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    names = compvis_names(FAMILY.trainable_parameters(unet, "cross-attn"), unet.config)
    table = [
        ("input_blocks", f"down_blocks.{i // 2}.attentions.{i % 2}", n)
        for i, n in enumerate((1, 2, 4, 5, 7, 8))
    ]
    table += [("output_blocks", f"up_blocks.{i // 3}.attentions.{i % 3}", i) for i in range(3, 12)]
    expected = {ours: f"{side}.{number}.1" for side, ours, number in table}
    expected["mid_block.attentions.0"] = "middle_block.1"
    suffixes = [f"transformer_blocks.0.attn2.{part}.weight" for part in ("to_k", "to_v")]
    assert names == {
        f"{ours}.{suffix}": f"model.diffusion_model.{theirs}.{suffix}"
        for ours, theirs in expected.items()
        for suffix in suffixes
    }


def test_another_build_of_unet_has_no_compvis_names(pipeline):
    config = {**pipeline.unet.config, "down_block_types": ("SimpleCrossAttnDownBlock2D",)}
    with pytest.raises(LayoutError, match="SimpleCrossAttnDownBlock2D .*allowed: DownBlock2D, Cross"):
        compvis_names([], config)
    with pytest.raises(LayoutError, match="add_embedding.x has no place"):
        compvis_names(["add_embedding.x"], pipeline.unet.config)


# Round trips


@pytest.mark.parametrize("form", ["delta-bin", "compvis"])
@pytest.mark.parametrize("group", GROUPS)
def test_the_references_forms_come_back_as_they_were(group, form, deltas, folder, tmp_path):
    path = tmp_path / "delta.bin"
    assert form in export_delta(deltas[group], path, form)
    tensors, metadata = import_delta(path, folder)
    expected = load_delta(deltas[group])[0]
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert metadata["group"] == group and metadata["base_model"] == str(folder)
    assert metadata["imported"]["form"] == form
    save_delta(tmp_path / "again.safetensors", tensors, metadata)
    images = [predictions(folder, delta)[1] for delta in (deltas[group], tmp_path / "again.safetensors")]
    assert torch.equal(*images)


def test_delta_bin_has_the_names_that_the_reference_reads(deltas, folder, tmp_path):
    export_delta(deltas["embedding"], tmp_path / "d.bin", "delta-bin")
    content = torch.load(tmp_path / "d.bin", weights_only=True)
    assert set(content) == {"unet", "text_encoder"} and content["unet"] == {}
    assert {name.startswith("text_model.") for name in content["text_encoder"]} == {True}
    export_delta(deltas["cross-attn"], tmp_path / "d.bin", "delta-bin")
    content = torch.load(tmp_path / "d.bin", weights_only=True)
    assert set(content) == {"unet"}
    unet = dict(load_pipeline(folder, device="cpu").unet.named_parameters())
    assert content["unet"] and set(content["unet"]) <= set(unet)


def test_a_delta_in_half_precision_is_read_in_full(deltas, folder, tmp_path):
    for group in ("cross-attn", "embedding"):
        export_delta(deltas[group], tmp_path / "d.bin", "delta-bin")
        content = torch.load(tmp_path / "d.bin", weights_only=True)
        half = {part: {n: t.half() for n, t in state.items()} for part, state in content.items()}
        torch.save(half, tmp_path / "half.bin")
        tensors, _ = import_delta(tmp_path / "half.bin", folder)
        # Rows that weren't trained equal the model's, in half precision; they don't count as trained.
        assert set(tensors) == set(load_delta(deltas[group])[0])
        assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("nested", [True, False])
def test_some_embedding_rows_are_the_vocabularys_last(nested, folder, pipeline, tmp_path):
    whole = pipeline.text_encoder.get_input_embeddings().weight.detach()
    embed = {"embed": whole[-2:] + 1}
    torch.save({"state_dict": embed} if nested else embed, tmp_path / "d.ckpt")
    tensors, metadata = import_delta(tmp_path / "d.ckpt", folder)
    assert metadata["group"] == "embedding"
    last = len(whole) - 1
    assert set(tensors) == {token_row_name("text_encoder", last - 1), token_row_name("text_encoder", last)}
    assert torch.equal(tensors[token_row_name("text_encoder", last)], whole[-1] + 1)


def test_our_own_delta_keeps_its_metadata(deltas, folder):
    tensors, metadata = import_delta(deltas["attn"], folder)
    assert set(tensors) == set(load_delta(deltas["attn"])[0])
    assert metadata["targets"] == ["owl"] and metadata["group"] == "attn"
    assert metadata["imported"]["form"] == "delta"


# Each form is opened by the library it is for


@pytest.mark.parametrize("half", [False, True])
def test_a_pipeline_folder_opens_plainly(half, deltas, folder, tmp_path):
    export_delta(deltas["full-weight"], tmp_path / "whole", "pipeline", half=half)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    base, expected = predictions(folder, deltas["full-weight"])
    error = (predict(plain) - expected).norm() / (expected - base).norm()
    assert error < (0.01 if half else 1e-5)
    assert json.loads((tmp_path / "whole" / "concept_ablation.json").read_text())["targets"] == ["owl"]
    stored = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16 if half else torch.float32}
    with pytest.raises(FormatError, match="is there already"):
        export_delta(deltas["full-weight"], tmp_path / "whole", "pipeline")
    assert sorted(os.listdir(tmp_path)) == ["whole"]


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("group", ["cross-attn", "attn", "full-weight"])
def test_a_lora_predicts_within_its_reported_error(group, form, deltas, folder, tmp_path):
    path, bound = tmp_path / "lora.safetensors", 0.05
    text = export_delta(deltas[group], path, form, error=bound)
    with safe_open(path, "pt") as file:
        report = json.loads(file.metadata()["concept_ablation"])["lora"]
    assert 0 < report["max_layer_error"] <= bound
    ranks = {layer["rank"] for layer in report["layers"].values()}
    assert len(ranks) > 1  # else wrongly shared scales would pass
    assert f"{report['error']:.2g}" in text
    # What biases and norms do isn't in a LoRA: compare with the delta without them.
    tensors, metadata = load_delta(deltas[group])
    kept = {name: value for name, value in tensors.items() if name not in report["left_out"]}
    assert (group == "cross-attn") == (not report["left_out"])
    if report["left_out"]:
        assert f"{len(report['left_out'])} changed parameters that a LoRA can't hold" in text
    save_delta(tmp_path / "kept.safetensors", kept, metadata)
    base, expected = predictions(folder, tmp_path / "kept.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(path)
    error = (predict(pipeline) - expected).norm() / (expected - base).norm()
    # The reported error is of weights; predictions follow it, not exactly.
    assert error < 2 * bound
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline), predict(StableDiffusionPipeline.from_pretrained(folder)))


def test_a_lora_gives_the_ablated_models_images(deltas, folder, tmp_path):
    path = tmp_path / "lora.safetensors"
    export_delta(deltas["cross-attn"], path, "lora", error=1e-4)
    images = []
    for load in (
        lambda p: p.load_lora_weights(path),
        lambda p: apply_delta(p, deltas["cross-attn"]),
        lambda p: None,
    ):
        pipeline = load_pipeline(folder, device="cpu")
        load(pipeline)
        draw = torch.Generator().manual_seed(0)
        images.append(pipeline("an owl", num_inference_steps=3, generator=draw, output_type="pt").images)
    lora, ablated, base = (
        image if isinstance(image, torch.Tensor) else torch.tensor(image) for image in images
    )
    assert (lora - ablated).abs().max() < 1e-2 * (base - ablated).abs().max()


def test_kohya_names(deltas, folder, tmp_path):
    path = tmp_path / "lora.safetensors"
    export_delta(deltas["full-weight"], path, "kohya", rank=3)
    tensors, unet = load_file(path), load_pipeline(folder, device="cpu").unet
    flat = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert tensors[f"{flat}.lora_down.weight"].shape == (3, 32)
    assert tensors[f"{flat}.lora_up.weight"].shape == (64, 3)
    assert tensors[f"{flat}.alpha"] == 3
    flat, layer = "lora_unet_down_blocks_0_resnets_0_conv1", unet.down_blocks[0].resnets[0].conv1
    assert tensors[f"{flat}.lora_down.weight"].shape == (3, 32, 3, 3)
    assert tensors[f"{flat}.lora_up.weight"].shape == (32, 3, 1, 1)
    change = load_delta(deltas["full-weight"])[0]["unet.down_blocks.0.resnets.0.conv1.weight"] - layer.weight
    product = tensors[f"{flat}.lora_up.weight"].flatten(1) @ tensors[f"{flat}.lora_down.weight"].flatten(1)
    left, values, right = torch.linalg.svd(change.detach().flatten(1), full_matrices=False)
    best = left[:, :3] * values[:3] @ right[:3]
    assert torch.allclose(product, best, atol=1e-5)


# Factorising


def test_the_least_rank_within_the_bound():
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(20, 12, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(30, 12, generator=draw))[0]
    values = 0.5 ** torch.arange(12)
    for change in ((left * values) @ right.T, ((left * values) @ right.T).T):
        for bound in (0.6, 0.3, 0.01, 0.001):
            layer = factorise({"unet.a.weight": change}, "unet", error=bound).layers["a"]
            tail = [float(values[r:].norm() / values.norm()) for r in range(13)]
            assert layer.rank == min(r for r in range(13) if tail[r] <= bound)
            assert layer.error == pytest.approx(tail[layer.rank], rel=1e-3)
    layer = factorise({"unet.a.weight": change}, "unet", rank=1000).layers["a"]
    assert layer.rank == 20 and layer.error < 1e-6


def test_what_a_lora_cannot_hold_is_counted():
    change = torch.eye(4)
    lora = factorise(
        {"unet.a.weight": change, "unet.a.bias": 2 * torch.ones(4), "unet.b.bias": torch.zeros(3)},
        "unet",
        rank=4,
    )
    assert lora.left_out == ["unet.a.bias"]
    assert lora.left_out_share == pytest.approx(4 / 20**0.5)
    assert lora.error == pytest.approx(lora.left_out_share)
    assert "1 changed parameters that a LoRA can't hold" in lora.summary()
    with pytest.raises(LoraError, match="changes only unet.a.bias"):
        factorise({"unet.a.bias": torch.ones(4)}, "unet", rank=4)
    with pytest.raises(LoraError, match="changes nothing"):
        factorise({"unet.a.weight": torch.zeros(4, 4)}, "unet", rank=4)


@pytest.mark.parametrize(
    "limits", [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"error": 0.0}, {"error": 1.0}]
)
def test_limits_of_a_lora(limits):
    with pytest.raises(LoraError, match="rank"):
        factorise({"unet.a.weight": torch.eye(4)}, "unet", **limits)


def test_the_embedding_group_is_refused_as_a_lora(deltas, tmp_path):
    with pytest.raises(LoraError, match="changes only text_encoder.token_embedding"):
        export_delta(deltas["embedding"], tmp_path / "lora.safetensors", "lora")
    assert os.listdir(tmp_path) == []


# Mistakes


def test_exports_that_make_no_sense(deltas, folder, tmp_path):
    delta = deltas["cross-attn"]
    with pytest.raises(FormatError, match="allowed: pipeline, delta-bin, compvis, lora, kohya"):
        export_delta(delta, tmp_path / "x", "onnx")
    with pytest.raises(FormatError, match="lora and kohya alone"):
        export_delta(delta, tmp_path / "x", "compvis", rank=3)
    with pytest.raises(FormatError, match="fp16 is for pipeline alone"):
        export_delta(delta, tmp_path / "x", "lora", half=True)
    other = make_tiny_pipeline(tmp_path / "other", latent_channels=8)
    save_delta(tmp_path / "d.safetensors", load_delta(deltas["full-weight"])[0], {})
    with pytest.raises(FormatError, match="give the model"):
        export_delta(tmp_path / "d.safetensors", tmp_path / "x", "lora")
    with pytest.raises(DeltaError, match="don't fit this model"):
        export_delta(tmp_path / "d.safetensors", tmp_path / "x", "lora", model=other)
    assert not (tmp_path / "x").exists()


def test_another_base_than_the_deltas_is_told(deltas, folder, tmp_path, caplog):
    tensors, metadata = load_delta(deltas["cross-attn"])
    save_delta(tmp_path / "d.safetensors", tensors, {**metadata, "base_fingerprint": "0" * 12})
    export_delta(tmp_path / "d.safetensors", tmp_path / "x.ckpt", "compvis")
    assert "other files than the base model that the delta was made for" in caplog.text


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "where", [lambda bad: bad, lambda bad: {"unet": {"a": bad}}, lambda bad: {"state_dict": bad}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(zipped, where, folder, tmp_path):
    path, touched = tmp_path / "delta.bin", tmp_path / "touched"
    torch.save(where(Touch(touched)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        FormatError, match="delta.bin: refused, nothing in it was run: opening it would call .*open"
    ):
        import_delta(path, folder)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the trap works


def test_files_that_are_no_deltas(folder, pipeline, tmp_path):
    def refused(content, message, name="d.bin"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file(content, path)
        else:
            torch.save(content, path)
        with pytest.raises((FormatError, DeltaError), match=message) as caught:
            import_delta(path, folder)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    value = pipeline.unet.state_dict()[key]
    compvis = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    refused(b"", "can't be read")
    refused(b"damaged", "damaged or holds more than tensors")
    refused(b"damaged", "can't be read", "d.safetensors")
    refused(torch.ones(3), "holds a Tensor, no delta .allowed: ")
    refused({}, "no delta")
    refused({"weights": {"a": value}}, "holds weights, which is no delta .allowed: ")
    refused({"a": value}, "holds a, which is no delta", "d.safetensors")
    refused({"unet": value}, "'unet' is a Tensor, no state dict")
    refused({"unet": {"other": value}}, "1 of 1 tensors don't fit, first unet.other, which this model hasn't")
    refused({"unet": {key: value[:1]}}, r"another model: 1 of 1 .*: \(1, 32\), in this model \(64, 32\)")
    refused({"unet": {key: "text"}}, r": str, in this model")
    refused({"unet": {key: torch.full_like(value, torch.nan)}}, "no finite numbers")
    refused({"unet": {key: value.int()}}, "no finite numbers")
    refused({"state_dict": {compvis.replace("3.1", "4.1"): value}}, "another model: .*input_blocks.4.1")
    refused({"state_dict": {compvis: value, "first_stage_model.x": value}}, "A whole checkpoint is no delta")
    refused(
        {"state_dict": {"embed": torch.ones(3, 31)}}, r"embed is \(3, 31\), the model's .* \(512|514, 32\)"
    )
    whole = pipeline.text_encoder.get_input_embeddings().weight.detach()
    refused({"state_dict": {"embed": whole}}, "only what the model already has")


# The stage


def test_the_stage_reads_a_rows_delta(deltas, folder, tmp_path):
    path = tmp_path / "published.ckpt"
    export_delta(deltas["cross-attn"], path, "compvis")
    spec = {
        "stage": "import_delta",
        "version": 1,
        "kind": "object",
        "targets": ["owl", "hen"],
        "anchor": "bird",
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model": {"path": str(folder), "revision": None, "fingerprint": "f"},
    }
    import_delta_stage(spec, tmp_path / "out" / "d.safetensors")
    tensors, metadata = load_delta(tmp_path / "out" / "d.safetensors")
    assert set(tensors) == set(load_delta(deltas["cross-attn"])[0])
    for name in ("kind", "targets", "anchor", "stage", "version"):
        assert metadata[name] == spec[name]
    assert (metadata["group"], metadata["settings"], metadata["seed"]) == ("cross-attn", None, None)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(FormatError, match="published.ckpt: changed since the run was planned"):
        import_delta_stage(spec, tmp_path / "out" / "d.safetensors")
    path.unlink()
    with pytest.raises(FormatError, match="published.ckpt: can't be read: No such file"):
        import_delta_stage(spec, tmp_path / "out" / "d.safetensors")
