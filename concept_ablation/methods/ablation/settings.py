"""A training's settings, checked; the optimizer and the learning-rate schedule that they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from concept_ablation.common.errors import UserError
from concept_ablation.common.hardware import Precision
from concept_ablation.diffusion.families.base import ParameterGroup
from concept_ablation.methods.ablation.data import Augmentation


class TrainingError(UserError):
    """Settings that don't go together, or a training that diverged; the message says what to do."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; `config/config.yaml` explains each and gives the paper's value, the config's schema its bounds.

    Raises TrainingError for settings that don't go together.
    """

    group: ParameterGroup
    loss: Literal["model-based", "noise-based"]
    steps: int
    learning_rate: float
    scale_lr: Literal["none", "compvis", "diffusers"]
    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    optimizer: Mapping[str, Any]
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ]
    lr_warmup_steps: int
    augmentation: Augmentation
    mask_border: bool
    hflip: float
    prior_preservation: bool
    prior_form: Literal["doubled", "halved"]
    prior_weight: float
    max_grad_norm: float | None
    precision: Precision
    teacher: Literal["current", "frozen"]
    detach_bos: bool
    preserve: Literal["none", "distill", "null-space", "both"] = "none"
    preserve_weight: float = 1.0
    preserve_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.prior_preservation and self.prior_form == "halved" and self.batch_size % 2:
            raise TrainingError(
                f"training.batch_size {self.batch_size} can't be halved: half of the batch is prior images; "
                "make it even, or take prior_form doubled"
            )

    @classmethod
    def from_spec(cls, settings: Mapping[str, object]) -> TrainingSettings:
        """The settings in a spec's `training`, which may hold other entries too."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    @property
    def preserves(self) -> bool:
        """Whether anything keeps what preserved prompts give."""
        return self.preserve != "none"

    @property
    def distills(self) -> bool:
        """Whether a loss holds the predictions for preserved prompts."""
        return self.preserve in ("distill", "both")

    @property
    def projects(self) -> bool:
        """Whether the weights' changes are kept in the null space of preserved prompts."""
        return self.preserve in ("null-space", "both")

    @property
    def in_effect(self) -> TrainingSettings:
        """The same training's settings, with those that it doesn't use at their defaults: equal where trainings are."""
        unused = {} if self.distills else {"preserve_weight": 1.0}
        unused |= {} if self.projects else {"preserve_tolerance": 1e-3}
        return replace(self, **unused)

    @property
    def images(self) -> int:
        """Images of the ablation's loss in a batch, and as many of the prior's: half of it if `halved`."""
        halved = self.prior_preservation and self.prior_form == "halved"
        return self.batch_size // 2 if halved else self.batch_size

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


def renamed(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of the config's `training` by the names that a spec has for them."""
    return {"group" if name == "parameter_group" else name: value for name, value in settings.items()}


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit state. Raises TrainingError if that isn't installed."""
    adam, make = settings.optimizer, torch.optim.AdamW
    if adam["name"] == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as make
        except ImportError as error:
            raise TrainingError(
                f"training.optimizer.name 'adamw8bit' needs bitsandbytes ({error}): "
                "`pip install bitsandbytes`, or take adamw"
            ) from error
    return make(
        parameters,
        lr=settings.scaled_learning_rate,
        betas=(adam["beta1"], adam["beta2"]),
        weight_decay=adam["weight_decay"],
        eps=adam["epsilon"],
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> Any:
    """The schedule by optimizer steps. Raises TrainingError for one that the learning rate is too low for."""
    from diffusers.optimization import get_scheduler

    name = settings.lr_scheduler
    if name == "constant" and settings.lr_warmup_steps:
        name = "constant_with_warmup"  # diffusers' "constant" would ignore the warm-up without a word
    steps = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.steps}
    try:
        return get_scheduler(name, optimizer, **steps)
    except ValueError as error:  # polynomial ends at 1e-7
        raise TrainingError(f"training.lr_scheduler {name!r}: {error}; raise the learning rate") from error
