import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from concept_ablation.common.image_store import read_store
from concept_ablation.diffusion import sampler as sampling
from concept_ablation.diffusion.delta import save_delta
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.sampler import SamplerError, sample_images
from concept_ablation.diffusion.stages import sample_ablated, sample_base
from concept_ablation.methods.ablation.anchors import generate_anchors

ROOT = Path(__file__).parents[1]
SAMPLER = {
    "scheduler": "dpmsolver++",
    "steps": 4,
    "guidance_scale": 3.0,
    "eta": 0.0,
    "precision": "fp32",
    "height": None,
    "width": None,
}
PROMPTS = ["a cat", "an owl", "a cat in the style of ink", "", "a rocket"]
SEEDS = [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def draw(pipeline, prompts=PROMPTS, seeds=SEEDS, batch_size=5, **changes):
    images = sample_images(pipeline, prompts, seeds, sampler={**SAMPLER, **changes}, batch_size=batch_size)
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [("dpmsolver++", 0.0), ("ddim", 1.0), ("euler", 0.0), ("pndm", 0.0), ("default", 0.0)],
)
def test_an_image_is_the_same_whatever_the_batch_size(pipeline, scheduler, eta, precision):
    together = draw(pipeline, scheduler=scheduler, eta=eta, precision=precision)
    for batch_size in (1, 3):
        apart = draw(pipeline, scheduler=scheduler, eta=eta, precision=precision, batch_size=batch_size)
        assert abs(apart - together).max() <= 1


def test_an_image_depends_on_its_own_seed_and_prompt_only(pipeline):
    torch.manual_seed(1)
    images = draw(pipeline)
    torch.manual_seed(2)
    assert abs(draw(pipeline, PROMPTS[::-1], SEEDS[::-1])[::-1] - images).max() <= 1
    assert abs(draw(pipeline, seeds=[9, 1, 2, 3, 4])[0] - images[0]).mean() > 5
    assert abs(draw(pipeline, ["an owl", *PROMPTS[1:]])[0] - images[0]).mean() > 0.1


def test_eta_draws_noise_from_the_images_own_generator(pipeline):
    still, noisy = (draw(pipeline, scheduler="ddim", eta=eta) for eta in (0.0, 1.0))
    assert abs(still - noisy).mean() > 5
    assert abs(noisy - draw(pipeline, scheduler="ddim", eta=1.0)).max() == 0


def test_bf16_is_close_to_fp32(pipeline):
    assert abs(draw(pipeline, precision="bf16") - draw(pipeline)).mean() < 5


def test_prediction_reaches_the_scheduler_in_fp32(pipeline, monkeypatch):
    seen = []
    from diffusers.schedulers import DDIMScheduler

    step = DDIMScheduler.step
    monkeypatch.setattr(
        DDIMScheduler,
        "step",
        lambda self, output, *rest, **kw: seen.append(output.dtype) or step(self, output, *rest, **kw),
    )
    draw(pipeline, scheduler="ddim", precision="bf16", batch_size=5)
    assert seen == [torch.float32] * SAMPLER["steps"]


def test_sampling_leaves_the_pipeline_as_it_was(pipeline):
    scheduler, forward = pipeline.scheduler, pipeline.unet.forward
    draw(pipeline, PROMPTS[:1], SEEDS[:1], scheduler="euler", precision="bf16")
    assert pipeline.scheduler is scheduler and pipeline.unet.forward == forward
    assert {value.dtype for value in pipeline.unet.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def embedded():
    return load_pipeline(ROOT / "embedded" / "emoji-diffusion", device="cpu")


def test_pictures_are_decoded_one_by_one_and_stay_the_same(embedded, monkeypatch):
    """A batch's decoding in fp32 would need more memory than all else. Within one grey level: few pixels differ at all."""
    decoded, decode = [], embedded.vae._decode
    monkeypatch.setattr(
        embedded.vae, "_decode", lambda z, *a, **kw: decoded.append(len(z)) or decode(z, *a, **kw)
    )
    sliced = draw(embedded)
    assert decoded == [1] * len(PROMPTS)
    assert not embedded.vae.use_slicing  # it would slice what a training encodes, too
    monkeypatch.setattr(sampling, "_one_at_a_time", lambda vae: contextlib.nullcontext())
    together = draw(embedded)
    assert decoded[len(PROMPTS) :] == [len(PROMPTS)]
    assert abs(sliced - together).max() <= 1 and (sliced != together).mean() < 1e-3


def test_size_can_be_set(pipeline):
    assert draw(pipeline, PROMPTS[:1], SEEDS[:1], height=48, width=64).shape == (1, 48, 64, 3)


@pytest.mark.parametrize(("factor", "channels", "prediction"), [(4, 4, "epsilon"), (8, 16, "v_prediction")])
def test_other_model_shapes(tmp_path, factor, channels, prediction):
    make_tiny_pipeline(
        tmp_path, size=32, vae_factor=factor, latent_channels=channels, prediction_type=prediction
    )
    assert draw(load_pipeline(tmp_path, device="cpu"), PROMPTS[:2], SEEDS[:2]).shape == (2, 32, 32, 3)


def test_unknown_scheduler_is_refused(pipeline):
    with pytest.raises(
        SamplerError, match="'heun' is unknown .allowed: default, ddim, dpmsolver.., euler, pndm"
    ):
        draw(pipeline, scheduler="heun")
    with pytest.raises(ValueError, match="5 prompts but 2 seeds"):
        draw(pipeline, seeds=[1, 2])


def test_a_negative_prompt_leads_away_and_needs_guidance(pipeline):
    plain = draw(pipeline, PROMPTS[:2], SEEDS[:2])
    options = {"sampler": SAMPLER, "negative_prompt": "a rocket"}
    away = [np.asarray(i) for i in sample_images(pipeline, PROMPTS[:2], SEEDS[:2], batch_size=2, **options)]
    assert abs(np.stack(away).astype(int) - plain).mean() > 0.1
    alone = next(sample_images(pipeline, PROMPTS[:1], SEEDS[:1], batch_size=1, **options))
    assert abs(np.asarray(alone).astype(int) - away[0]).max() <= 1
    options["sampler"] = {**SAMPLER, "guidance_scale": 1.0}
    with pytest.raises(SamplerError, match="'a rocket' does nothing without guidance"):
        next(sample_images(pipeline, PROMPTS[:1], SEEDS[:1], batch_size=1, **options))


def test_anchor_images_that_are_copies_are_left_out(folder, tmp_path, monkeypatch):
    class Judge:
        """Takes the first and the third image that it sees for copies; there are two of each prompt."""

        def __init__(self, image, descriptor, device):
            assert (image, descriptor) == ({"file": "a"}, {"model": "b"})
            self.seen = 0

        def similarity(self, images):
            places = [self.seen + place for place, _ in enumerate(images)]
            self.seen = places[-1] + 1
            return np.array([place in (0, 2) for place in places], float)

        def is_copy(self, similarity):
            return similarity > 0.5

    monkeypatch.setattr("concept_ablation.evaluation.memorized.CopyJudge", Judge)
    spec = {"model": {"path": str(folder), "revision": None}, "sampler": SAMPLER, "images": 4, "seed": 5}
    spec |= {"negative_prompt": "a rocket"}
    written = {"prompts": ["a cat", "two cats"], "target_prompts": ["the caption"]}
    (tmp_path / "prompts.json").write_text(json.dumps(written))
    stores = []
    for extra in ({}, {"image": {"file": "a"}, "descriptor": {"model": "b"}}):
        path = tmp_path / "a.parquet"
        generate_anchors({**spec, **extra}, tmp_path / "prompts.json", path, device="cpu", batch_size=4)
        stores.append(read_store(path))
    plain, filtered = stores
    assert filtered.column("seed") == [6, 8, 9, 10] and filtered.column("index") == [0, 1, 2, 3]
    assert filtered.column("prompt") == ["two cats", "two cats", "a cat", "two cats"]
    assert filtered.metadata["copies_dropped"] == 2 and "copies_dropped" not in plain.metadata
    assert filtered.metadata["target_prompts"] == plain.metadata["target_prompts"] == ["the caption"]
    for position, same in ((0, 1), (1, 3)):
        difference = np.asarray(filtered.image(position)).astype(int) - np.asarray(plain.image(same))
        assert abs(difference).max() <= 1


def test_stages_write_stores(folder, pipeline, tmp_path):
    model = {"path": str(folder), "revision": None}
    spec = {"stage": "generate_anchors", "model": model, "sampler": SAMPLER, "images": 3, "seed": 5}
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": ["a cat", "two cats"]}))
    generate_anchors(spec, tmp_path / "prompts.json", tmp_path / "a.parquet", device="cpu", batch_size=2)
    anchors = read_store(tmp_path / "a.parquet")
    assert anchors.column("prompt") == ["a cat", "two cats", "a cat"]
    assert anchors.column("seed") == [5, 6, 7]
    assert anchors.column("role") == [None] * 3
    assert anchors.metadata["sampler"] == SAMPLER and anchors.metadata["precision"] == "fp32"

    probe = {"subject": "cat", "prompts": ["a cat"], "images": 2, "seed": 5}
    sample_base({"model": model, "sampler": SAMPLER, "probe": probe}, tmp_path / "b.parquet", device="cpu")
    base = read_store(tmp_path / "b.parquet")
    assert base.column("subject") == ["cat"] * 2 and base.column("seed") == [5, 6]
    assert abs(np.asarray(base.image(0)).astype(int) - np.asarray(anchors.image(0))).max() <= 1

    weights = FAMILY.trainable_parameters(pipeline.unet, "cross-attn")
    save_delta(
        tmp_path / "d.safetensors",
        {f"unet.{name}": value * 2 for name, value in weights.items()},
        {"seed": 1},
    )
    owl = {"role": "neighbor", "subject": "owl", "prompts": ["an owl"], "images": 1, "seed": 5}
    probes = [{**probe, "role": "target"}, owl]
    spec = {"model": model, "sampler": SAMPLER, "probes": probes}
    sample_ablated(spec, tmp_path / "d.safetensors", tmp_path / "s.parquet", device="cpu")
    samples = read_store(tmp_path / "s.parquet")
    assert samples.metadata["delta_metadata"] == {"seed": 1}
    assert [(row["role"], row["index"]) for row in samples.rows] == [
        ("target", 0),
        ("target", 1),
        ("neighbor", 0),
    ]
    target = samples.select(role="target")
    assert target.column("seed") == base.column("seed") and target.column("prompt") == base.column("prompt")
    assert abs(np.asarray(target.image(0)).astype(int) - np.asarray(base.image(0))).mean() > 0.1


class Casts(TorchDispatchMode):
    """How often each of these tensors is copied to another precision."""

    def __init__(self, tensors):
        super().__init__()
        self.count = {value.data_ptr(): 0 for value in tensors}

    def __torch_dispatch__(self, function, types, inputs=(), named=None):
        if function is torch.ops.aten._to_copy.default and inputs[0].data_ptr() in self.count:
            self.count[inputs[0].data_ptr()] += 1
        return function(*inputs, **(named or {}))


@pytest.mark.parametrize("trains", [True, False])
def test_weights_are_cast_once_a_batch_and_not_once_a_step(pipeline, trains):
    pipeline.unet.requires_grad_(trains)
    try:
        with Casts(pipeline.unet.parameters()) as casts:
            draw(pipeline, precision="bf16")
        assert max(casts.count.values()) == 1
        assert {value.requires_grad for value in pipeline.unet.parameters()} == {trains}
    finally:
        pipeline.unet.requires_grad_(True)
