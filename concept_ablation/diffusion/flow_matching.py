"""Flow matching: latents move to noise on a straight line, and the network predicts the velocity (Esser et al. 2024).

At noise level s, between 0 and 1, the noisy latents are (1 - s) x latents + s x noise, and the velocity is noise - latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from concept_ablation.diffusion.families.base import Family, NoiseSchedule

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor, nn

MIXED = "its text tokens change from block to block together with the picture's"
"""Why such a network's keys and values aren't linear in the text's encoding, and no token is the same for every prompt."""
PROJECTIONS = (".add_k_proj", ".add_v_proj")


class FlowSchedule(NoiseSchedule):
    """Noise levels from a logit-normal density, shifted as the model's scheduler shifts them. A timestep is 1000 x the level.

    With u = sigmoid(z), z standard normal, the level is shift x u / (1 + (shift - 1) x u): the density that Stable Diffusion 3 was
    trained with. A scheduler that shifts by the picture's size, as FLUX.1's, does so while sampling alone; here its shift is 1.

    `config`: that of the pipeline's own scheduler.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.steps = config["num_train_timesteps"]
        self.shift = 1.0 if config.get("use_dynamic_shifting") else config["shift"]

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        import torch

        even = torch.sigmoid(torch.randn(count, generator=generator))
        return self.steps * self.shift * even / (1 + (self.shift - 1) * even)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        level = (timesteps / self.steps).view(-1, 1, 1, 1).to(latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents


class FlowFamily(Family):
    """What transformers of text and picture together share that are trained so."""

    network_name = "transformer"
    schedulers: ClassVar = {"flow-euler": ("FlowMatchEulerDiscreteScheduler", {})}
    latent_sampler = "flow-euler"

    def latents(self, pipeline: DiffusionPipeline, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        deviation, config = (
            (0.5 * log_variance.clamp(-30, 20)).exp(),
            pipeline.vae.config,
        )  # diffusers' bounds
        return (mean + deviation * noise.to(mean) - config.shift_factor) * config.scaling_factor

    def noise_schedule(self, pipeline: DiffusionPipeline) -> NoiseSchedule:
        return FlowSchedule(pipeline.scheduler.config)

    def text_projections(self, network: nn.Module) -> dict[str, nn.Module]:
        return {name: layer for name, layer in network.named_modules() if name.endswith(PROJECTIONS)}
