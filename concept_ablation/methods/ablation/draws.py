"""Everything that is random in a training, drawn before anything is computed from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_ablation.diffusion.families.base import NoiseSchedule
from concept_ablation.diffusion.placeholders import placed
from concept_ablation.methods.ablation.data import AnchorData, Batch, View
from concept_ablation.methods.ablation.settings import TrainingSettings

FOUND = 0.5
"""The share of target prompts that name what attacks found, once they did."""


@dataclass(frozen=True)
class LossDraws:
    """What one loss of a batch of n images is computed from. All tensors are on the CPU.

    `batch`: the images, mirrored and augmented. `prompts`: the prompt that each image is denoised under.
    `anchor_prompts`: the prompt that each image was made from. `posterior_noise`: (n, channels, cells, cells), which
    draws the latents from the VAE's posterior. `noise`: of the same shape, which is added to the latents at
    `timesteps`, (n,).
    """

    batch: Batch
    prompts: list[str]
    anchor_prompts: list[str]
    posterior_noise: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class BatchDraws:
    """What one batch of a step is computed from: the ablation's loss and, with prior preservation, the prior's.

    `preserved`: with distillation, the preserved prompt that each of the target's images is denoised under, too.
    """

    target: LossDraws
    prior: LossDraws | None
    preserved: list[str] | None = None


class TrainingDraws:
    """The draws of a training, batch by batch. An optimizer step takes `gradient_accumulation` batches.

    Two generators, both on the CPU and both started from the training's seed, draw in this order:

    | `choices` (Python's) | `noises` (torch's) |
    |---|---|
    | the images' positions (a new shuffle when all were used), then which are mirrored | the posterior's noise |
    | for each image: its scale, its place on the canvas, its prefix | the added noise |
    | for each image: one of its target prompts; in a hardened training, once something was found, half of the time one that names it | the timesteps |
    | the same for the prior's images, but for the target prompts | the same for the prior's images |
    | with distillation, a preserved prompt for each image | |

    So a batch depends on the seed and on the batches before it, and on no device. A checkpoint must hold `state()`:
    the states of both generators, and the positions that each of the two streams of images still has to give before
    its next shuffle.

    `targets[i]`: the target prompts of image i. `preserved`: the preserved prompts. `channels`: of the latents. `vae_factor`: a latent cell's side in pixels.
    `open_prompts[i]`: those of image i with `roles.MARK` in the target's place. `found`: what attacks found to stand there.
    """

    def __init__(
        self,
        data: AnchorData,
        targets: Sequence[Sequence[str]],
        settings: TrainingSettings,
        seed: int,
        schedule: NoiseSchedule,
        *,
        channels: int,
        vae_factor: int,
        preserved: Sequence[str] = (),
        open_prompts: Sequence[Sequence[str]] = (),
    ) -> None:
        self.data, self.targets, self.settings = data, targets, settings
        self.open_prompts, self.found = open_prompts, []
        self.preserved = list(preserved)
        self.schedule, self.channels = schedule, channels
        self.choices, self.noises = random.Random(seed), torch.Generator("cpu").manual_seed(seed)
        self.halved = settings.prior_form == "halved"
        views = (settings.hflip, vae_factor, self.choices, settings.mask_border)
        self.batches = data.batches(settings.images, settings.augmentation, *views)
        prior_augmentation = settings.augmentation if self.halved else "none"
        self.prior_batches = data.batches(settings.images, prior_augmentation, *views)

    def next_batch(self) -> BatchDraws:
        """Draw the next batch, in the order that the class describes."""
        target = self._draw(next(self.batches), self._target_prompt)
        prior = None
        if self.settings.prior_preservation:
            prior = self._draw(next(self.prior_batches), self._prior_prompt)
        preserved = None
        if self.settings.distills:
            preserved = self.choices.choices(self.preserved, k=len(target.prompts))
        return BatchDraws(target, prior, preserved)

    def _draw(self, batch: Batch, prompt: Callable[[int, View], str]) -> LossDraws:
        prompts = [prompt(i, view) for i, view in zip(batch.positions, batch.views, strict=True)]
        anchor_prompts = [self.data.prompts[i] for i in batch.positions]
        shape = (len(prompts), self.channels, *batch.views[0].mask.shape[1:])
        posterior_noise, noise = (torch.randn(shape, generator=self.noises) for _ in range(2))
        timesteps = self.schedule.draw_timesteps(len(prompts), self.noises)
        return LossDraws(batch, prompts, anchor_prompts, posterior_noise, noise, timesteps)

    def _target_prompt(self, position: int, view: View) -> str:
        if self.found and self.choices.random() < FOUND:
            prompt = self.choices.choice(self.open_prompts[position])
            return view.prefix + placed(prompt, self.choices.choice(self.found))
        return view.prefix + self.choices.choice(self.targets[position])

    def _prior_prompt(self, position: int, view: View) -> str:
        """The image's own; the CompVis form of the prior says in it how the image was augmented."""
        return (view.prefix if self.halved else "") + self.data.prompts[position]

    def state(self) -> dict[str, object]:
        """What the draws to come depend on: tensors, and what JSON can hold."""
        return {
            "rng": self.choices.getstate(),
            "generator": self.noises.get_state(),
            "remaining": list(self.batches.remaining),
            "prior_remaining": list(self.prior_batches.remaining),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what `state()` gave."""
        self.choices.setstate(state["rng"])
        self.noises.set_state(state["generator"])
        self.batches.remaining = list(state["remaining"])
        self.prior_batches.remaining = list(state["prior_remaining"])
