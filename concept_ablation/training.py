"""Training: make a network predict for a target prompt what it predicts for the anchor prompt.

`train` changes a pipeline's UNet in place and yields a record after each optimizer step; whoever iterates
logs, shows progress, or stops. All random numbers come from its own generators, on the CPU: two runs on a CPU
are equal bit for bit, and the draws don't depend on the device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from tqdm import tqdm

from concept_ablation.data import AnchorData, Augmentation, Batch, Encoder
from concept_ablation.losses import Predict, model_based_loss, noise_based_loss, prior_loss
from concept_ablation.models import (
    METADATA_KEY,
    ParameterGroup,
    detach_bos,
    load_pipeline,
    save_delta,
    trainable_parameters,
)
from concept_ablation.prompts import target_prompts
from concept_ablation.runtime import Precision, atomic_output, peak_memory, resolve_precision

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """Settings that are unknown, or a training that diverged; the message says what to do."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; `config/config.yaml` explains each and gives the paper's value. Raises TrainingError."""

    group: ParameterGroup
    loss: Literal["model-based", "noise-based"]
    steps: int
    learning_rate: float
    scale_lr: Literal["none", "compvis", "diffusers"]
    batch_size: int
    gradient_accumulation: int
    optimizer: Mapping[str, float]
    lr_scheduler: str
    lr_warmup_steps: int
    augmentation: Augmentation
    hflip: float
    prior_preservation: bool
    prior_weight: float
    max_grad_norm: float | None
    precision: Precision
    teacher: Literal["current", "frozen"]
    detach_bos: bool

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainingSettings).items():
            allowed = [choice for choice in get_args(hint) if isinstance(choice, str)]
            if allowed and getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise TrainingError(f"training.{name} {value!r} is unknown (allowed: {', '.join(allowed)})")

    @classmethod
    def from_spec(cls, settings: Mapping[str, object]) -> TrainingSettings:
        """The settings in a spec's `training`, in which other stages' keys may be too."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate after `scale_lr`.

        `compvis`: times accumulation and batch size; `diffusers`: the same, and doubled with prior
        preservation.
        """
        if self.scale_lr == "none":
            return self.learning_rate
        doubled = 2 if self.scale_lr == "diffusers" and self.prior_preservation else 1
        return self.learning_rate * self.gradient_accumulation * self.batch_size * doubled


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    `loss` without the prior term, `prior_loss` before its weight (NaN if there is none), `grad_norm` before
    clipping, `seconds` of this step, `peak_memory_bytes` so far.
    """

    step: int
    loss: float
    prior_loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int


def train(
    pipeline: StableDiffusionPipeline,
    data: AnchorData,
    targets: Sequence[Sequence[str]],
    settings: TrainingSettings,
    *,
    seed: int,
) -> Iterator[StepRecord]:
    """Train `pipeline.unet` in place on `data`; yields a record after each of `settings.steps` steps.

    `targets[i]`: the target prompts that image i's is drawn from, each as likely as the others. Raises
    TrainingError if the loss is no number any more.
    """
    parameters = trainable_parameters(pipeline.unet, settings.group)
    pipeline.unet.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    accelerator = _make_accelerator(settings.precision, pipeline.device)
    optimizer, lr_scheduler = _make_optimizer(list(parameters.values()), settings)
    optimizer = accelerator.prepare_optimizer(optimizer)
    losses = _draw_losses(pipeline, data, targets, settings, accelerator, seed)
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    with detach_bos(pipeline.unet) if settings.detach_bos else contextlib.nullcontext():
        for step in range(1, settings.steps + 1):
            started = time.perf_counter()
            loss, prior = _backward(losses, settings, accelerator)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}: lower the learning rate, or use fp32"
                )
            grad_norm = float(accelerator.clip_grad_norm_(parameters.values(), limit))
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            yield StepRecord(
                step, loss, prior, learning_rate, grad_norm, seconds, peak_memory(pipeline.device)
            )


def _make_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is shared by a whole process and can't be changed; without this a process could train only
    # once.
    AcceleratorState._reset_state(reset_partial_state=True)
    resolved = resolve_precision(precision, device)
    return Accelerator(mixed_precision="no" if resolved == "fp32" else resolved, cpu=device.type == "cpu")


def _make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings
) -> tuple[torch.optim.AdamW, Any]:
    from diffusers.optimization import get_scheduler

    adam = settings.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.scaled_learning_rate,
        betas=(adam["beta1"], adam["beta2"]),
        weight_decay=adam["weight_decay"],
        eps=adam["epsilon"],
    )
    name = settings.lr_scheduler
    if name == "constant" and settings.lr_warmup_steps:
        name = "constant_with_warmup"  # diffusers' "constant" would ignore the warm-up without a word
    lr_scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=settings.steps
    )
    return optimizer, lr_scheduler


def _backward(
    losses: Iterator[tuple[Tensor, Tensor]], settings: TrainingSettings, accelerator: Accelerator
) -> tuple[float, float]:
    """Gradients of one optimizer step; returns the means over its batches of the loss and the prior loss."""
    means = torch.zeros(2)
    for _ in range(settings.gradient_accumulation):
        loss, prior = next(losses)
        total = loss + settings.prior_weight * prior if settings.prior_preservation else loss
        accelerator.backward(total / settings.gradient_accumulation)
        means += torch.stack([loss, prior]).detach().cpu() / settings.gradient_accumulation
    return means[0].item(), means[1].item()


def _draw_losses(
    pipeline: StableDiffusionPipeline,
    data: AnchorData,
    targets: Sequence[Sequence[str]],
    settings: TrainingSettings,
    accelerator: Accelerator,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches, noise, timesteps and prompts; yield each batch's loss and prior loss (NaN: none)."""
    from diffusers.schedulers import DDPMScheduler

    rng, generator = random.Random(seed), torch.Generator("cpu").manual_seed(seed)
    encoder = Encoder(pipeline, settings.precision)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    predict, teacher = _predictors(pipeline.unet, settings, accelerator)
    views = (settings.hflip, pipeline.vae_scale_factor, rng)
    batches = data.batches(settings.batch_size, settings.augmentation, *views)
    prior_batches = data.batches(settings.batch_size, "none", *views)

    def draw(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        latents = encoder.latents(batch, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        return latents, noise, timesteps.to(latents.device)

    for batch in batches:
        prompts = [
            view.prefix + rng.choice(targets[i]) for i, view in zip(batch.positions, batch.views, strict=True)
        ]
        latents, noise, timesteps = draw(batch)
        text, mask = encoder.text(prompts), batch.mask.to(latents)
        if settings.loss == "model-based":
            noisy = scheduler.add_noise(latents, noise, timesteps)
            anchor_text = encoder.text([data.prompts[i] for i in batch.positions])
            loss = model_based_loss(predict, teacher, noisy, timesteps, text, anchor_text, mask)
        else:
            loss = noise_based_loss(predict, scheduler, latents, noise, timesteps, text, mask)
        prior = torch.full_like(loss, math.nan)
        if settings.prior_preservation:
            batch = next(prior_batches)
            own_text = encoder.text([data.prompts[i] for i in batch.positions])
            prior = prior_loss(predict, scheduler, *draw(batch), own_text)
        yield loss, prior


def _predictors(
    unet: nn.Module, settings: TrainingSettings, accelerator: Accelerator
) -> tuple[Predict, Predict]:
    """The network's prediction and the teacher's: the same, or by the trained parameters as they are now."""

    def predict(noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        # One autocast a prediction: it caches half-precision weights, and the teacher's have no gradient.
        with accelerator.autocast():
            return unet(noisy, timesteps, text).sample

    if settings.teacher == "current":
        return predict, predict
    parameters = trainable_parameters(unet, settings.group)
    frozen = {name: value.detach().clone() for name, value in parameters.items()}

    def predict_frozen(noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        with accelerator.autocast():
            return torch.func.functional_call(unet, frozen, (noisy, timesteps, text)).sample

    return predict, predict_frozen


def ablate_concept(
    spec: Mapping,
    anchors_path: str | Path,
    delta_path: str | Path,
    training_path: str | Path,
    *,
    device: str = "auto",
) -> None:
    """Stage `ablate_concept`: train on the anchor's images, write the delta and the table of steps.

    Raises TrainingError, StoreError, ModelError, PromptsError.
    """
    pipeline = load_pipeline(spec["model"]["path"], spec["model"]["revision"], device)
    data = AnchorData.from_store(anchors_path)
    settings = TrainingSettings.from_spec(spec["training"])
    templates = spec["training"]["style_templates"]
    targets = target_prompts(data.prompts, spec["kind"], spec["target"], spec["anchor"], templates)
    records = train(pipeline, data, targets, settings, seed=spec["seed"])
    steps = list(
        tqdm(records, desc=f"{spec['target']} -> {spec['anchor']}", total=settings.steps, unit="step")
    )
    metadata = _describe(spec, settings, pipeline.device)
    parameters = trainable_parameters(pipeline.unet, settings.group)
    write_records(training_path, steps, metadata)
    save_delta(delta_path, {f"unet.{name}": value for name, value in parameters.items()}, metadata)
    log.info("trained %d tensors in %d steps: %s", len(parameters), len(steps), delta_path)


def _describe(spec: Mapping, settings: TrainingSettings, device: torch.device) -> dict[str, object]:
    """A delta's metadata: what was removed from which model, and how."""
    return {
        "base_model": spec["model"]["path"],
        "base_revision": spec["model"]["revision"],
        "base_fingerprint": spec["model"].get("fingerprint"),
        **{
            name: spec.get(name)
            for name in ("kind", "target", "anchor", "anchors", "seed", "stage", "version")
        },
        "group": settings.group,
        "settings": spec["training"],
        "scaled_learning_rate": settings.scaled_learning_rate,
        "device": device.type,
        "precision": resolve_precision(settings.precision, device),
    }


def write_records(path: str | Path, records: Sequence[StepRecord], metadata: Mapping[str, object]) -> None:
    """Write one row a step to a Parquet file, `metadata` as JSON under `concept_ablation`."""
    table = pa.Table.from_pylist([asdict(record) for record in records])
    with atomic_output(path) as part:
        pq.write_table(
            table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)}), part
        )
