"""The objective of ablation: the losses of what was drawn for a batch. Nothing here is random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.families.base import Conditioning, Family, ParameterGroup, family_of
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.draws import BatchDraws, LossDraws
from concept_ablation.methods.ablation.losses import Predict, model_based_loss, noise_based_loss, prior_loss
from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.methods.ablation.token_embeddings import TrainableTokenEmbeddings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class AblationObjective:
    """The losses, as functions of a batch's draws and of the weights as they are now: the ablation's, the prior's, distillation's.

    `embeddings`: the token embeddings that are trained, if they are. A frozen teacher, and what distillation holds
    to, is the network as it is when this object is made.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        settings: TrainingSettings,
        accelerator: Accelerator,
        embeddings: TrainableTokenEmbeddings | None = None,
    ) -> None:
        family = family_of(pipeline)
        self.settings = settings
        self.encoder = Encoder(pipeline, settings.precision, embeddings)
        self.schedule = family.noise_schedule(pipeline)
        frozen = settings.teacher == "frozen"
        network, needed = family.network(pipeline), frozen or settings.distills
        self.predict, self.unchanged = _predictors(family, network, settings.group, accelerator, needed)
        self.teacher = self.unchanged if frozen else self.predict

    def losses(self, draws: BatchDraws) -> Iterator[tuple[str, Tensor]]:
        """The losses that were drawn for, of `ablation`, `prior`, `preserve`: fp32 scalars with gradient, not yet weighted.

        Each is computed when it is asked for: after the backward pass of the one before, whose graph is gone by then.
        """
        yield "ablation", self._ablation_loss(draws.target)
        if draws.prior:
            yield "prior", self._prior_loss(draws.prior)
        if draws.preserved:
            yield "preserve", self._distillation_loss(draws.target, draws.preserved)

    def _ablation_loss(self, draws: LossDraws) -> Tensor:
        """Pull the target prompts' predictions to the anchor prompts' (model-based), or to the noise (noise-based)."""
        latents, noise, timesteps = self._latents(draws)
        noisy, mask = self.schedule.add_noise(latents, noise, timesteps), draws.batch.mask.to(latents)
        target = self.encoder.framed(self.encoder.current_text(draws.prompts), draws.batch)
        if self.settings.loss == "noise-based":
            goal = self.schedule.target(latents, noise, timesteps)
            return noise_based_loss(self.predict, noisy, timesteps, target, goal, mask)
        encode = self.encoder.text if self.settings.teacher == "frozen" else self.encoder.current_text
        with torch.no_grad():
            anchor = self.encoder.framed(encode(draws.anchor_prompts), draws.batch)
        return model_based_loss(self.predict, self.teacher, noisy, timesteps, target, anchor, mask)

    def _prior_loss(self, draws: LossDraws) -> Tensor:
        """The denoising loss of images under their own prompts, in one of the two published forms.

        `doubled` (diffusers): plain images, mean over all elements. `halved` (CompVis): images augmented, prompts
        prefixed and errors masked as for the target, so summed over channels.
        """
        latents, noise, timesteps = self._latents(draws)
        noisy, goal = (
            of(latents, noise, timesteps) for of in (self.schedule.add_noise, self.schedule.target)
        )
        own = self.encoder.framed(self.encoder.current_text(draws.prompts), draws.batch)
        if self.settings.prior_form == "halved":
            mask = draws.batch.mask.to(latents)
            return noise_based_loss(self.predict, noisy, timesteps, own, goal, mask)
        return prior_loss(self.predict, noisy, timesteps, own, goal)

    def _distillation_loss(self, draws: LossDraws, prompts: list[str]) -> Tensor:
        """Hold the predictions for preserved prompts to the unchanged network's, on the target's noisy latents."""
        latents, noise, timesteps = self._latents(draws)
        noisy, mask = self.schedule.add_noise(latents, noise, timesteps), draws.batch.mask.to(latents)
        now, before = (
            self.encoder.framed(encode(prompts), draws.batch)
            for encode in (self.encoder.current_text, self.encoder.text)
        )
        return model_based_loss(self.predict, self.unchanged, noisy, timesteps, now, before, mask)

    def _latents(self, draws: LossDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the images, the noise for them and the timesteps, on the pipeline's device."""
        latents = self.encoder.latents(draws.batch, draws.posterior_noise)
        return latents, draws.noise.to(latents), draws.timesteps.to(latents.device)


class Predictor(nn.Module):
    """A family's prediction by a network, as a module: so that a call can be made with other parameters."""

    def __init__(self, family: Family, network: nn.Module) -> None:
        super().__init__()
        self.family, self.network = family, network

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.family.predict(self.network, noisy, timesteps, conditioning)


def _predictors(
    family: Family, network: nn.Module, group: ParameterGroup, accelerator: Accelerator, frozen: bool
) -> tuple[Predict, Predict]:
    """The network's prediction, and, if `frozen`, that with a copy of its trained parameters as they are now; else the same."""
    predictor = Predictor(family, network)

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # One autocast a prediction: it caches half-precision weights, and the teacher's have no gradient.
        with accelerator.autocast():
            return predictor(noisy, timesteps, conditioning)

    if not frozen:
        return predict, predict
    parameters = family.trainable_parameters(network, group)
    copies = {f"network.{name}": value.detach().clone() for name, value in parameters.items()}

    def predict_frozen(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        with accelerator.autocast():
            return torch.func.functional_call(predictor, copies, (noisy, timesteps, conditioning))

    return predict, predict_frozen
