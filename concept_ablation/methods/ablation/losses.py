"""The losses of concept ablation: functions of tensors and of a function that predicts.

Shapes: latents, noise and predictions (n, channels, h, w); timesteps (n,); text encodings (n, tokens, width);
masks (n, 1, h, w) of zeros and ones. Losses are fp32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (noisy latents, timesteps, text) -> prediction
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error inside the mask: a sample's sum over its number of cells, then the mean of the batch.

    Summed, not averaged, over channels, as in the reference: four times an element-wise mean for 4 channels.
    """
    error = (prediction.float() - target.float()).square() * mask
    return (error.sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network of `scheduler` (a diffusers DDPMScheduler) should predict: the noise, or the velocity.

    Raises ValueError for another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction type {kind!r} can't be trained (allowed: epsilon, v_prediction)")


def model_based_loss(
    predict: Predict,
    teacher: Predict,
    noisy: Tensor,
    timesteps: Tensor,
    target_text: Tensor,
    anchor_text: Tensor,
    mask: Tensor,
) -> Tensor:
    """Pull the target prompt's prediction to the anchor prompt's, for the same noisy latents.

    The paper's model-based objective. `teacher` predicts for the anchor, without gradient: the network itself
    in the paper.
    """
    with torch.no_grad():
        goal = teacher(noisy, timesteps, anchor_text)
    return masked_mse(predict(noisy, timesteps, target_text), goal, mask)


def noise_based_loss(
    predict: Predict,
    scheduler: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    target_text: Tensor,
    mask: Tensor,
) -> Tensor:
    """Redefine the target prompt by the anchor's images: their denoising loss, the noise-based objective."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    goal = denoising_target(scheduler, latents, noise, timesteps)
    return masked_mse(predict(noisy, timesteps, target_text), goal, mask)


def prior_loss(
    predict: Predict, scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor
) -> Tensor:
    """The plain denoising loss of images under their own prompts: mean over all elements, no mask.

    The diffusers code's prior term. The CompVis code's is `noise_based_loss` of the images' own prompts.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    goal = denoising_target(scheduler, latents, noise, timesteps)
    return (predict(noisy, timesteps, text).float() - goal.float()).square().mean()
