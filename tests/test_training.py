import dataclasses
import itertools
import json
import math
import sys
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import make_tiny_pipeline

from concept_ablation.common.image_store import StoreError, write_store
from concept_ablation.diffusion.delta import apply_delta
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import FAR_PREFIXES, NEAR_PREFIXES, AnchorData, Batch
from concept_ablation.methods.ablation.settings import TrainingError, TrainingSettings
from concept_ablation.methods.ablation.stage import ablate_concept
from concept_ablation.methods.ablation.training import Training

SETTINGS = TrainingSettings(
    group="cross-attn",
    loss="model-based",
    steps=2,
    learning_rate=1e-3,
    scale_lr="none",
    batch_size=4,
    gradient_accumulation=1,
    gradient_checkpointing=False,
    optimizer={"name": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "epsilon": 1e-8},
    lr_scheduler="constant",
    lr_warmup_steps=0,
    augmentation="none",
    mask_border=False,
    hflip=0.5,
    prior_preservation=False,
    prior_form="doubled",
    prior_weight=1.0,
    max_grad_norm=1.0,
    precision="fp32",
    teacher="current",
    detach_bos=True,
)
PROMPTS = ["a cat", "a red cat", "two cats", "a cat on a mat"]
TARGETS = [(prompt.replace("cat", "owl"), prompt.replace("cat", "fox")) for prompt in PROMPTS]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(4)
]
DATA = AnchorData(PICTURES, PROMPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def weights(pipeline):
    return {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}


def run(pipeline, seed=0, **changes):
    return list(Training(pipeline, DATA, TARGETS, dataclasses.replace(SETTINGS, **changes), seed=seed))


def changed(before, pipeline):
    return {name for name, value in pipeline.unet.named_parameters() if not torch.equal(before[name], value)}


def test_settings_without_effect_make_no_other_training():
    """A ladder's rung that changes only such settings isn't climbed again."""
    plain = dataclasses.replace(SETTINGS, preserve="none")
    assert (
        dataclasses.replace(plain, preserve_tolerance=1e-2, preserve_weight=3.0).in_effect == plain.in_effect
    )
    kept = dataclasses.replace(SETTINGS, preserve="null-space")
    assert dataclasses.replace(kept, preserve_weight=3.0).in_effect == kept.in_effect
    assert dataclasses.replace(kept, preserve_tolerance=1e-2).in_effect != kept.in_effect


def test_two_steps_are_pinned(pipeline):
    before = weights(pipeline)
    records = run(pipeline)
    assert [record.step for record in records] == [1, 2]
    assert [record.loss for record in records] == pytest.approx([0.00130126, 0.00187148], rel=1e-3)
    assert [record.grad_norm for record in records] == pytest.approx([0.0271606, 0.0367141], rel=1e-3)
    moved = math.sqrt(
        sum(float((before[n] - v).square().sum().detach()) for n, v in pipeline.unet.named_parameters())
    )
    assert moved == pytest.approx(0.215993, rel=1e-3)


@pytest.mark.parametrize("group", ["cross-attn", "attn", "full-weight"])
def test_only_the_group_is_trained(pipeline, group):
    before = weights(pipeline)
    run(pipeline, group=group, steps=1)
    assert changed(before, pipeline) == set(FAMILY.trainable_parameters(pipeline.unet, group))


def test_two_runs_are_equal_bit_for_bit_whatever_the_global_seed(folder):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        pipeline = load_pipeline(folder, device="cpu")
        records = run(pipeline, augmentation="compvis", prior_preservation=True)
        results.append(([(r.loss, r.prior_loss, r.grad_norm) for r in records], weights(pipeline)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    assert run(load_pipeline(folder, device="cpu"), seed=1, steps=1)[0].loss != results[0][0][0][0]


def record_predictions(pipeline, monkeypatch):
    """Every call of the UNet: its inputs, its prediction, and whether it had a gradient."""
    calls, forward = [], pipeline.unet.forward

    def spy(noisy, timesteps, text):
        out = forward(noisy, timesteps, text)
        calls.append((noisy, timesteps, text, out.sample.detach().float(), torch.is_grad_enabled()))
        return out

    monkeypatch.setattr(pipeline.unet, "forward", spy)
    return calls


def test_the_first_loss_against_plain_torch(pipeline, monkeypatch):
    """Anchor without, target with gradient, on the same latents; no cell masked, so summed over channels."""
    calls = record_predictions(pipeline, monkeypatch)
    record = run(pipeline, steps=1)[0]
    (anchor, target) = calls
    assert torch.equal(anchor[0], target[0]) and torch.equal(anchor[1], target[1])
    assert not torch.equal(anchor[2], target[2])
    assert (anchor[4], target[4]) == (False, True)
    assert record.loss == pytest.approx(4 * float((target[3] - anchor[3]).square().mean()), rel=1e-5)
    assert math.isnan(record.prior_loss)


def test_stop_gradient_equals_a_formula_with_a_constant_anchor(pipeline, monkeypatch):
    calls = record_predictions(pipeline, monkeypatch)
    norm = run(pipeline, steps=1, max_grad_norm=None, learning_rate=1e-30)[0].grad_norm
    (noisy, timesteps, anchor_text, goal, _), (_, _, target_text, _, _) = calls
    parameters = list(FAMILY.trainable_parameters(pipeline.unet, "cross-attn").values())
    norms = []
    for constant in (True, False):
        with FAMILY.detach_bos(pipeline.unet):
            prediction = pipeline.unet(noisy, timesteps, target_text).sample
            anchor = goal if constant else pipeline.unet(noisy, timesteps, anchor_text).sample
            gradients = torch.autograd.grad(4 * (prediction - anchor).square().mean(), parameters)
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    assert norm == pytest.approx(norms[0], rel=1e-4)
    assert norm != pytest.approx(norms[1], rel=1e-2)


def test_teacher_is_the_current_network_unless_frozen(folder):
    current, frozen = (
        [r.loss for r in run(load_pipeline(folder, device="cpu"), teacher=teacher, steps=3)]
        for teacher in ("current", "frozen")
    )
    assert current[0] == pytest.approx(frozen[0], rel=1e-6)
    assert current[2] != pytest.approx(frozen[2], rel=1e-3)


def test_frozen_teacher_predicts_as_the_original(pipeline, folder, monkeypatch):
    calls = record_predictions(pipeline, monkeypatch)
    run(pipeline, teacher="frozen", steps=3)
    noisy, timesteps, text, prediction, _ = calls[4]
    with torch.no_grad():
        original = load_pipeline(folder, device="cpu").unet(noisy, timesteps, text).sample
    assert torch.allclose(prediction, original, atol=1e-5)


def test_bos_gets_no_gradient_and_predictions_stay(pipeline):
    unet = pipeline.unet
    noisy, text = torch.randn(2, 4, 4, 4), torch.randn(2, 7, 32)
    timesteps = torch.tensor([10, 900])
    plain = unet(noisy, timesteps, text).sample
    with FAMILY.detach_bos(unet):
        assert torch.equal(unet(noisy, timesteps, text).sample, plain)
        for layer in FAMILY.text_projections(unet).values():
            gradient = torch.autograd.grad(layer(text).sum(), layer.weight)[0]
            expected = text[:, 1:].sum((0, 1)).expand_as(gradient)
            assert torch.allclose(gradient, expected, atol=1e-4)
        self_attention = next(m for n, m in unet.named_modules() if n.endswith("attn1.to_k"))
        states = torch.randn(1, 3, self_attention.in_features)
        gradient = torch.autograd.grad(self_attention(states).sum(), self_attention.weight)[0]
        assert torch.allclose(gradient, states.sum((0, 1)).expand_as(gradient), atol=1e-4)
    assert sum(len(module._forward_hooks) for module in unet.modules()) == 0


def test_detach_bos_enters_training_only_if_asked(folder):
    norms = [
        run(load_pipeline(folder, device="cpu"), steps=1, detach_bos=on)[0].grad_norm for on in (True, False)
    ]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_a_training_that_is_stopped_leaves_no_hooks(pipeline):
    records = iter(Training(pipeline, DATA, TARGETS, SETTINGS, seed=0))
    next(records)
    records.close()
    assert sum(len(module._forward_hooks) for module in pipeline.unet.modules()) == 0


def test_prefixes_go_on_target_prompts_only(pipeline, monkeypatch):
    asked = []
    text = Encoder.text
    monkeypatch.setattr(
        Encoder, "text", lambda self, prompts: asked.append(list(prompts)) or text(self, prompts)
    )
    run(pipeline, augmentation="compvis", steps=8, batch_size=8)
    targets, anchors = itertools.chain(*asked[::2]), list(itertools.chain(*asked[1::2]))
    prefixes = (*FAR_PREFIXES, *NEAR_PREFIXES)
    assert set(anchors) == set(PROMPTS)
    stripped = [(prompt.startswith(prefixes), prompt) for prompt in targets]
    assert 0 < sum(prefixed for prefixed, _ in stripped) < len(stripped)
    allowed = {prefix + prompt for prefix in ("", *prefixes) for pair in TARGETS for prompt in pair}
    assert {prompt for _, prompt in stripped} <= allowed
    assert {prompt.split()[-1] for _, prompt in stripped} >= {
        "owl",
        "fox",
    }  # each of a prompt's targets is drawn


def test_augmented_cells_are_masked(pipeline, monkeypatch):
    calls = record_predictions(pipeline, monkeypatch)
    loss = run(pipeline, steps=1, augmentation="diffusers", batch_size=8)[0].loss
    assert loss != pytest.approx(4 * float((calls[1][3] - calls[0][3]).square().mean()), rel=1e-3)


def test_weights_and_gradients_stay_fp32_under_bf16(pipeline):
    before = weights(pipeline)
    run(pipeline, precision="bf16", steps=1, learning_rate=1e-7)
    trained = FAMILY.trainable_parameters(pipeline.unet, "cross-attn")
    assert {value.dtype for value in pipeline.unet.parameters()} == {torch.float32}
    assert changed(before, pipeline) == set(trained)
    # Steps of 1e-7 are far below what bf16 can hold: it would have lost nearly all of them.
    moved = torch.cat([(before[name] != value).flatten() for name, value in trained.items()])
    in_half = torch.cat([(before[name].bfloat16() != v.bfloat16()).flatten() for name, v in trained.items()])
    assert moved.float().mean() > 0.9 and in_half.float().mean() < 0.01


def test_bf16_loss_is_close_to_fp32(folder):
    losses = [
        [r.loss for r in run(load_pipeline(folder, device="cpu"), precision=precision)]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]


def test_accumulated_batches_are_averaged(folder):
    apart = run(load_pipeline(folder, device="cpu"), steps=2, learning_rate=1e-30, batch_size=2)
    together = run(load_pipeline(folder, device="cpu"), steps=1, gradient_accumulation=2, batch_size=2)
    assert together[0].loss == pytest.approx(sum(r.loss for r in apart) / 2, rel=1e-5)
    assert together[0].grad_norm < max(r.grad_norm for r in apart)


def test_gradients_are_clipped(folder):
    """AdamW divides by the gradient's size, so clipping shows where that falls below epsilon."""
    moves = []
    for limit in (None, 1e-14):
        pipeline = load_pipeline(folder, device="cpu")
        before = weights(pipeline)
        optimizer = {**SETTINGS.optimizer, "weight_decay": 0.0}
        assert run(pipeline, steps=1, max_grad_norm=limit, optimizer=optimizer)[0].grad_norm > 1e-6
        moves.append(
            max(float((before[n] - v).abs().max().detach()) for n, v in pipeline.unet.named_parameters())
        )
    assert moves[0] == pytest.approx(1e-3, rel=0.01) and moves[1] < 1e-6


def test_prior_preservation(folder, monkeypatch):
    pipeline = load_pipeline(folder, device="cpu")
    calls = record_predictions(pipeline, monkeypatch)
    record = run(pipeline, steps=1, prior_preservation=True, augmentation="compvis")[0]
    assert len(calls) == 3 and calls[2][4] and record.prior_loss > 0
    prior_texts = {tuple(text.flatten().tolist()) for text in calls[2][2]}
    own = Encoder(pipeline).text(PROMPTS).hidden
    assert prior_texts <= {tuple(text.flatten().tolist()) for text in own}
    norms = [
        run(load_pipeline(folder, device="cpu"), steps=1, prior_preservation=on, prior_weight=weight)[
            0
        ].grad_norm
        for on, weight in ((False, 1.0), (True, 0.0), (True, 1.0))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[2] != pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["plain", "scaled as for fp16"])
@pytest.mark.parametrize("form", ["doubled", "halved"])
def test_both_losses_gradients_are_those_of_their_weighted_sum(folder, form, scale):
    settings = {
        "prior_preservation": True,
        "prior_form": form,
        "prior_weight": 0.3,
        "augmentation": "compvis",
    }
    settings |= {"gradient_accumulation": 2}
    trainings = [
        Training(
            load_pipeline(folder, device="cpu"),
            DATA,
            TARGETS,
            dataclasses.replace(SETTINGS, **settings),
            seed=1,
        )
        for _ in range(2)
    ]
    for training in trainings:
        training._accelerator.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    means = trainings[0]._backward()
    batches = [trainings[1]._draws.next_batch() for _ in range(2)]
    losses = [torch.stack([loss for _, loss in trainings[1]._objective.losses(batch)]) for batch in batches]
    losses = torch.stack(losses).mean(0)
    (losses @ torch.tensor([1.0, 0.3]) * (scale or 1.0)).backward()
    assert list(means.values()) == pytest.approx(losses.tolist())
    for name, parameter in trainings[0].parameters.items():
        expected = trainings[1].parameters[name].grad
        assert float((parameter.grad - expected).norm() / expected.norm()) < 1e-5, name


def test_one_graph_is_alive_at_a_time(folder):
    """What autograd keeps for the backward pass, at its peak: no more with a second loss than with one."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.nbytes

    peaks = []
    for prior in (False, True):
        pipeline, peak = load_pipeline(folder, device="cpu"), 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            run(pipeline, prior_preservation=prior, gradient_accumulation=2)
        peaks.append(peak)
        assert alive == 0
    assert 0 < peaks[1] <= 1.05 * peaks[0]


def record_noise(monkeypatch):
    """Every normal tensor that is drawn; for a batch first the posterior's, then the noise."""
    noises, draw = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **kw: noises.append(draw(*a, **kw)) or noises[-1])
    return noises


def squared_error(call, noise, kind):
    """Of a prediction against what the schedule says it should be, element by element."""
    noisy, timesteps, _, prediction, _ = call
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps].view(-1, 1, 1, 1)
    latents = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
    goal = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    return (prediction - goal).square()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("form", ["doubled", "halved"])
def test_both_published_forms_of_the_prior(tmp_path, kind, form, monkeypatch):
    """Diffusers: as many plain prior images again, mean over all elements. CompVis: half of the batch, augmented
    and masked as the target's, the prefix on the image's own prompt, errors summed over channels.
    """
    pipeline = load_pipeline(make_tiny_pipeline(tmp_path, size=32, prediction_type=kind), device="cpu")
    calls, noises = record_predictions(pipeline, monkeypatch), record_noise(monkeypatch)
    asked, masks = [], []
    text, mask = Encoder.text, Batch.mask.fget
    monkeypatch.setattr(
        Encoder, "text", lambda self, prompts: asked.append(list(prompts)) or text(self, prompts)
    )
    monkeypatch.setattr(Batch, "mask", property(lambda self: masks.append(mask(self)) or masks[-1]))
    record = run(
        pipeline,
        steps=1,
        batch_size=16,
        prior_preservation=True,
        prior_form=form,
        augmentation="compvis",
        seed=1,
    )[0]
    images = 16 if form == "doubled" else 8
    assert [len(call[0]) for call in calls] == [images] * 3
    error = squared_error(calls[2], noises[3], kind)
    prefixed = [prompt for prompt in asked[2] if prompt.startswith((*FAR_PREFIXES, *NEAR_PREFIXES))]
    if form == "doubled":
        assert not prefixed and set(asked[2]) == set(PROMPTS)
        assert record.prior_loss == pytest.approx(float(error.mean()), rel=1e-3)
    else:
        assert prefixed and all(prompt.endswith(tuple(PROMPTS)) for prompt in asked[2])
        assert masks[1].min() == 0
        expected = ((error * masks[1]).sum((1, 2, 3)) / masks[1].sum((1, 2, 3))).mean()
        assert record.prior_loss == pytest.approx(float(expected), rel=1e-3)


def test_an_odd_batch_cannot_be_halved():
    with pytest.raises(TrainingError, match="training.batch_size 3 can't be halved.*make it even"):
        dataclasses.replace(SETTINGS, batch_size=3, prior_preservation=True, prior_form="halved")
    dataclasses.replace(SETTINGS, batch_size=3, prior_form="halved")


def test_the_border_is_masked_if_asked(pipeline, monkeypatch):
    calls = record_predictions(pipeline, monkeypatch)
    loss = run(pipeline, steps=1, mask_border=True)[0].loss
    inner = (calls[1][3] - calls[0][3])[:, :, 1:3, 1:3]
    assert loss == pytest.approx(4 * float(inner.square().mean()), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_training(folder, monkeypatch):
    results, forwards = [], []
    for on in (False, True):
        pipeline = load_pipeline(folder, device="cpu")
        block = pipeline.unet.up_blocks[0].resnets[0]
        forward, count = block.forward, []
        monkeypatch.setattr(block, "forward", lambda *a, f=forward, c=count: c.append(1) or f(*a))
        records = run(pipeline, gradient_checkpointing=on)
        results.append(([r.loss for r in records], weights(pipeline)))
        forwards.append(len(count))
        assert not pipeline.unet.is_gradient_checkpointing
    assert results[0][0] == pytest.approx(results[1][0])
    assert all(torch.allclose(value, results[1][1][name]) for name, value in results[0][1].items())
    # Anchor and target in each of two steps; the target's again in the backward pass.
    assert forwards == [4, 6]


def test_8_bit_adam_is_bitsandbytes(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    adam = {**SETTINGS.optimizer, "name": "adamw8bit"}
    with pytest.raises(TrainingError, match="'adamw8bit' needs bitsandbytes.*`pip install bitsandbytes`"):
        run(pipeline, optimizer=adam)
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, *args, **settings):
            made.append(settings)
            super().__init__(*args, **settings)

    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    run(pipeline, optimizer=adam)
    assert made == [{"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_based_loss_aims_at_what_the_model_predicts(tmp_path, kind, monkeypatch):
    pipeline = load_pipeline(make_tiny_pipeline(tmp_path, size=32, prediction_type=kind), device="cpu")
    calls, noises = record_predictions(pipeline, monkeypatch), record_noise(monkeypatch)
    record = run(pipeline, steps=1, loss="noise-based")[0]
    assert len(calls) == 1
    assert record.loss == pytest.approx(4 * float(squared_error(calls[0], noises[1], kind).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 1, 1, 1, 1]),
        ("linear", [0, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 1, 0.853553, 0.5, 0.146447]),
        ("cosine_with_restarts", [0, 1, 0.853553, 0.5, 0.146447]),
        ("polynomial", [0, 1, 0.750025, 0.50005, 0.250075]),
    ],
)
def test_learning_rate_schedules(pipeline, name, expected):
    records = run(pipeline, steps=5, lr_warmup_steps=1, lr_scheduler=name)
    assert [1000 * record.learning_rate for record in records] == pytest.approx(expected, abs=1e-5)


def test_a_schedule_that_ends_above_its_start_is_refused(pipeline):
    with pytest.raises(TrainingError, match="'polynomial'.*raise the learning rate"):
        run(pipeline, lr_scheduler="polynomial", learning_rate=1e-8)


def test_learning_rate_follows_scheduler_and_scaling_rule(pipeline):
    records = run(pipeline, steps=4, lr_scheduler="linear")
    assert [record.learning_rate for record in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    records = run(pipeline, steps=3, lr_warmup_steps=2)
    assert [record.learning_rate for record in records] == pytest.approx([0, 5e-4, 1e-3])
    scaled = {
        (rule, prior): dataclasses.replace(
            SETTINGS, scale_lr=rule, prior_preservation=prior, gradient_accumulation=3
        ).scaled_learning_rate
        for rule in ("none", "compvis", "diffusers")
        for prior in (False, True)
    }
    assert [scaled[rule, False] for rule in ("none", "compvis", "diffusers")] == pytest.approx(
        [1e-3, 12e-3, 12e-3]
    )
    assert [scaled[rule, True] for rule in ("none", "compvis", "diffusers")] == pytest.approx(
        [1e-3, 12e-3, 24e-3]
    )


def test_a_diverged_training_stops(pipeline):
    with torch.no_grad():
        next(iter(FAMILY.trainable_parameters(pipeline.unet, "cross-attn").values())).fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower the learning rate"):
        run(pipeline)


def spec(folder):
    training = {"style_templates": ["{prompt} in the style of {target}"], **dataclasses.asdict(SETTINGS)}
    model = {"path": str(folder), "revision": None, "fingerprint": "123"}
    pair = {"kind": "object", "targets": ["owl"], "anchor": "cat"}
    return {
        "stage": "ablate_concept",
        "version": 1,
        "model": model,
        "anchors": "k",
        **pair,
        "training": training,
        "seed": 3,
    }


def test_ablate_concept_writes_a_delta_and_a_record(folder, tmp_path):
    rows = [
        {"image": p, "prompt": q, "seed": i, "index": i}
        for i, (p, q) in enumerate(zip(PICTURES, PROMPTS, strict=True))
    ]
    write_store(tmp_path / "a.parquet", rows, {})
    ablate_concept(
        spec(folder), tmp_path / "a.parquet", tmp_path / "d.safetensors", tmp_path / "t.parquet", device="cpu"
    )

    trained = load_pipeline(folder, device="cpu")
    targets = [("an owl",), ("a red owl",), ("two owls",), ("an owl on a mat",)]
    records = list(Training(trained, DATA, targets, SETTINGS, seed=3))
    pipeline = load_pipeline(folder, device="cpu")
    metadata = apply_delta(pipeline, tmp_path / "d.safetensors")
    assert not changed(weights(trained), pipeline)
    assert changed(weights(load_pipeline(folder, device="cpu")), pipeline)
    expected = {
        "base_model": str(folder),
        "targets": ["owl"],
        "anchor": "cat",
        "kind": "object",
        "seed": 3,
        "version": 1,
        "scale_lr": "none",
        "scaled_learning_rate": 1e-3,
    }
    assert metadata.items() >= expected.items() and metadata["settings"] == spec(folder)["training"]

    table = pq.read_table(tmp_path / "t.parquet")
    columns = ["step", "loss", "prior_loss", "learning_rate", "grad_norm", "seconds", "peak_memory_bytes"]
    assert table.column_names == columns
    assert table.column("loss").to_pylist() == pytest.approx([record.loss for record in records])
    assert json.loads(table.schema.metadata[b"concept_ablation"])["targets"] == ["owl"]


def test_memorization_draws_the_prompts_that_were_searched_for(folder, tmp_path, monkeypatch):
    rows = [{"image": p, "prompt": q, "seed": 0, "index": 0} for p, q in zip(PICTURES, PROMPTS, strict=True)]
    paths = [tmp_path / name for name in ("a.parquet", "d.safetensors", "t.parquet")]
    own = {**spec(folder), "kind": "memorization", "targets": ["a famous owl"]}
    write_store(paths[0], rows, {})
    with pytest.raises(TrainingError, match="a.parquet: no target_prompts"):
        ablate_concept(own, *paths, device="cpu")
    write_store(paths[0], rows, {"target_prompts": ["the owl poster", "a famous owl"]})
    asked, text = [], Encoder.text
    monkeypatch.setattr(Encoder, "text", lambda self, prompts: asked.append(prompts) or text(self, prompts))
    ablate_concept(own, *paths, device="cpu")
    assert set(itertools.chain(*asked[::2])) == {"the owl poster", "a famous owl"}
    assert set(itertools.chain(*asked[1::2])) == set(PROMPTS)


def test_ablate_concept_names_a_damaged_store_and_writes_nothing(folder, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(StoreError, match="a.parquet: a damaged image store"):
        ablate_concept(
            spec(folder),
            tmp_path / "a.parquet",
            tmp_path / "d.safetensors",
            tmp_path / "t.parquet",
            device="cpu",
        )
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]
