"""The losses of concept ablation: functions of tensors and of a function that predicts.

Shapes: noisy latents, goals and predictions (n, channels, h, w); timesteps (n,); masks (n, 1, h, w) of zeros and ones.
A conditioning is what the predicting function is told of n prompts; it is handed on unread. Losses are fp32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (noisy latents, timesteps, conditioning) -> prediction
Predict = Callable[[Tensor, Tensor, Any], Tensor]


def masked_mse(prediction: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Squared error inside the mask: a sample's sum over its number of cells, then the mean of the batch.

    Summed, not averaged, over channels, as in the reference: four times an element-wise mean for 4 channels.
    """
    error = (prediction.float() - goal.float()).square() * mask
    return (error.sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()


def model_based_loss(
    predict: Predict,
    teacher: Predict,
    noisy: Tensor,
    timesteps: Tensor,
    target: Any,
    anchor: Any,
    mask: Tensor,
) -> Tensor:
    """Pull the prediction for the target prompts to that for the anchor prompts, on the same noisy latents.

    The paper's model-based objective. `target`, `anchor`: the two conditionings. `teacher` predicts for the anchor,
    without gradient: the network itself in the paper.
    """
    with torch.no_grad():
        goal = teacher(noisy, timesteps, anchor)
    return masked_mse(predict(noisy, timesteps, target), goal, mask)


def noise_based_loss(
    predict: Predict, noisy: Tensor, timesteps: Tensor, conditioning: Any, goal: Tensor, mask: Tensor
) -> Tensor:
    """The denoising loss of the anchor's images under target prompts, which redefines these: the noise-based objective.

    `goal`: what the network should predict of `noisy` latents, the noise or a velocity.
    """
    return masked_mse(predict(noisy, timesteps, conditioning), goal, mask)


def prior_loss(predict: Predict, noisy: Tensor, timesteps: Tensor, conditioning: Any, goal: Tensor) -> Tensor:
    """The plain denoising loss of images under their own prompts: mean over all elements, no mask.

    The diffusers code's prior term. The CompVis code's is `noise_based_loss` of the images' own prompts.
    """
    return (predict(noisy, timesteps, conditioning).float() - goal.float()).square().mean()
