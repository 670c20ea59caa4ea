"""What both halves of `faithfulness.py` share: the steps of the authors' code, replayed by ours, and how they differ."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from concept_ablation.diffusion.families.base import Conditioning
from concept_ablation.methods.ablation.data import AnchorData, Batch, View
from concept_ablation.methods.ablation.draws import BatchDraws, LossDraws
from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.methods.ablation.training import Training

LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
PROMPTS = [
    "a cat",
    "a red cat",
    "a photo of a cat",
    "a blue cat",
    "two cats",
    "a yellow cat",
    "a cat on a mat",
    "cat",
]
ADAMW = {"name": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "epsilon": 1e-8}
SETTINGS = TrainingSettings(
    group="cross-attn",
    loss="model-based",
    steps=3,
    learning_rate=1e-5,
    scale_lr="diffusers",
    batch_size=4,
    gradient_accumulation=1,
    gradient_checkpointing=False,
    optimizer=ADAMW,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    augmentation="none",
    mask_border=True,
    hflip=0.0,
    prior_preservation=False,
    prior_form="doubled",
    prior_weight=1.0,
    max_grad_norm=1.0,
    precision="fp32",
    teacher="current",
    detach_bos=True,
)


@dataclasses.dataclass
class Half:
    """The images of one loss in a step: what was drawn for them. `mask` (n, 1, cells, cells)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list
    anchors: list
    mask: Tensor


@dataclasses.dataclass
class Step:
    """One step of theirs: its halves, the trained weights before it, its loss, and its gradients, by our names."""

    target: Half
    prior: Half | None
    weights: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


@dataclasses.dataclass
class Difference:
    """The largest of a case: relative difference of losses, of gradient tensors, of weights at the end."""

    name: str
    loss: float
    gradient: float
    final: float


def replay(
    pipeline, settings: TrainingSettings, steps: Sequence[Step], texts: Mapping | None = None
) -> Training:
    """Our training, its random draws replaced by those recorded. `texts`: encodings, if there's no text encoder."""
    data = AnchorData([Image.new("RGB", (8, 8))], [""])
    training = Training(pipeline, data, [("",)], settings, seed=0)
    batches = [BatchDraws(as_draws(step.target), step.prior and as_draws(step.prior)) for step in steps]
    training._draws = SimpleNamespace(next_batch=iter(batches).__next__)
    encoder = training._objective.encoder
    encoder.latents = lambda batch, noise: noise  # theirs were recorded, see `as_draws`
    if texts is not None:
        encoder.text = lambda prompts: Conditioning(torch.stack([texts[prompt] for prompt in prompts]))
    return training


def as_draws(half: Half) -> LossDraws:
    """What was recorded as if we had drawn it, with the latents in the place of the noise that would draw them."""
    views = [View(torch.zeros(3, 8, 8), mask, "", False) for mask in half.mask]
    batch = Batch(list(range(len(views))), [False] * len(views), views)
    return LossDraws(batch, half.prompts, half.anchors, half.latents, half.noise, half.timesteps)


def compare(name: str, make_pipeline, settings: TrainingSettings, steps, final, texts=None) -> Difference:
    """Each step from their weights, then all steps on our own; `final`: their weights at the end, or None."""
    training, losses, gradients = replay(make_pipeline(), settings, steps, texts), [0.0], [0.0]
    for step in steps:
        with torch.no_grad():
            for parameter, value in training.parameters.items():
                value.copy_(step.weights[parameter])
        loss, prior = one_step(training)
        total = loss + settings.prior_weight * prior if settings.prior_preservation else loss
        losses.append(abs(total - step.loss) / abs(step.loss))
        scale = max(float(value.norm()) for value in step.gradients.values())
        for parameter, value in training.parameters.items():
            theirs = step.gradients[parameter]
            # A tensor with next to no gradient of its own is measured against the largest one's.
            size = max(float(theirs.norm()), 1e-6 * scale)
            gradients.append(float((value.grad - theirs).norm()) / size)
            value.grad = None
    moved = float("nan")
    if final is not None:
        training = replay(make_pipeline(), settings, steps, texts)
        list(training)
        before = steps[0].weights
        apart = sum(float((v.detach() - final[n]).square().sum()) for n, v in training.parameters.items())
        way = sum(float((before[n] - final[n]).square().sum()) for n in training.parameters)
        moved = (apart / way) ** 0.5
    return Difference(name, max(losses), max(gradients), moved)


def one_step(training: Training) -> tuple[float, float]:
    """The losses and gradients of a step, which isn't taken."""
    detached = training.family.detach_bos(training.network)
    with detached if training.settings.detach_bos else contextlib.nullcontext():
        return training._backward()
