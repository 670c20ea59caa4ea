"""What a training draws at random, and the losses of it: batches, prompts, noise, timesteps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.parameters import trainable_parameters
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import AnchorData, Batch
from concept_ablation.methods.ablation.losses import Predict, model_based_loss, noise_based_loss, prior_loss
from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.methods.ablation.token_embeddings import TokenRows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


class Losses:
    """Draws batches, noise, timesteps and prompts, and gives the losses of them."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        data: AnchorData,
        targets: Sequence[Sequence[str]],
        settings: TrainingSettings,
        accelerator: Accelerator,
        seed: int,
        rows: TokenRows | None = None,
    ) -> None:
        from diffusers.schedulers import DDPMScheduler

        self.data, self.targets, self.settings = data, targets, settings
        self.rng, self.generator = random.Random(seed), torch.Generator("cpu").manual_seed(seed)
        self.encoder = Encoder(pipeline, settings.precision, rows)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.predict, self.teacher = _predictors(pipeline.unet, settings, accelerator)
        views = (settings.hflip, pipeline.vae_scale_factor, self.rng, settings.mask_border)
        prior_augmentation = settings.augmentation if settings.prior_form == "halved" else "none"
        self.batches = data.batches(settings.images, settings.augmentation, *views)
        self.prior_batches = data.batches(settings.images, prior_augmentation, *views)

    def of_next_batch(self) -> Iterator[Tensor]:
        """The loss of the next batch and, with prior preservation, its prior loss.

        Each is computed when it is asked for: after the backward pass of the one before, whose graph is gone by then.
        """
        yield self._loss(next(self.batches))
        if self.settings.prior_preservation:
            yield self._prior_loss(next(self.prior_batches))

    def _loss(self, batch: Batch) -> Tensor:
        prompts = [
            view.prefix + self.rng.choice(self.targets[i])
            for i, view in zip(batch.positions, batch.views, strict=True)
        ]
        latents, noise, timesteps = self._draw(batch)
        text, mask = self.encoder.current_text(prompts), batch.mask.to(latents)
        if self.settings.loss == "noise-based":
            return noise_based_loss(self.predict, self.scheduler, latents, noise, timesteps, text, mask)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        encode = self.encoder.text if self.settings.teacher == "frozen" else self.encoder.current_text
        with torch.no_grad():
            anchor_text = encode([self.data.prompts[i] for i in batch.positions])
        return model_based_loss(self.predict, self.teacher, noisy, timesteps, text, anchor_text, mask)

    def _prior_loss(self, batch: Batch) -> Tensor:
        """The denoising loss of images under their own prompts, in one of the two published forms.

        `doubled` (diffusers): plain images, mean over all elements. `halved` (CompVis): images augmented,
        prompts prefixed and errors masked as for the target, so summed over channels.
        """
        halved = self.settings.prior_form == "halved"
        prompts = [
            (view.prefix if halved else "") + self.data.prompts[i]
            for i, view in zip(batch.positions, batch.views, strict=True)
        ]
        latents, noise, timesteps = self._draw(batch)
        parts = (self.predict, self.scheduler, latents, noise, timesteps, self.encoder.current_text(prompts))
        return noise_based_loss(*parts, batch.mask.to(latents)) if halved else prior_loss(*parts)

    def _draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's latents, noise (n, channels, cells, cells) and timesteps (n,)."""
        latents = self.encoder.latents(batch, self.generator)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        count = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), generator=self.generator)
        return latents, noise, timesteps.to(latents.device)

    def state(self) -> dict[str, object]:
        """The random generators' states and the positions in the data."""
        return {
            "rng": self.rng.getstate(),
            "generator": self.generator.get_state(),
            "remaining": list(self.batches.remaining),
            "prior_remaining": list(self.prior_batches.remaining),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what `state()` gave."""
        self.rng.setstate(state["rng"])
        self.generator.set_state(state["generator"])
        self.batches.remaining = list(state["remaining"])
        self.prior_batches.remaining = list(state["prior_remaining"])


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
