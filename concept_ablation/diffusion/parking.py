"""Text encoders that are on a GPU only while they encode: T5 has more weights than most GPUs have room for beside a training.

They wait in the machine's memory. A prompt is encoded once a training, and once a batch of pictures, so moving them costs seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from concept_ablation.diffusion.families.base import family_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

HOOKS = "_parking_hooks"


def place(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move a pipeline to `device`; on a GPU its family's `parked` encoders come only while they encode."""
    family = family_of(pipeline)
    names = set(family.parked if device.type == "cuda" else ()) & family.encoders(pipeline).keys()
    if not names:
        pipeline.to(device)
        return
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in names:
            part.to(device)
    park((getattr(pipeline, name) for name in names), device)


def park(encoders: Iterable[nn.Module], device: torch.device) -> None:
    """Let each encoder move to `device` when it is called, and back to the machine's memory when it has answered."""

    def come(encoder: nn.Module, inputs: tuple) -> None:
        encoder.to(device)

    def leave(encoder: nn.Module, inputs: tuple, output: object) -> None:
        encoder.to("cpu")

    for encoder in encoders:
        hooks = encoder.register_forward_pre_hook(come), encoder.register_forward_hook(leave)
        setattr(encoder, HOOKS, hooks)


def stay(pipeline: DiffusionPipeline) -> None:
    """Let all encoders stay on the pipeline's device from now on: a gradient needs the weights where they answered."""
    for encoder in family_of(pipeline).encoders(pipeline).values():
        for hook in encoder.__dict__.pop(HOOKS, ()):
            hook.remove()
            encoder.to(pipeline.device)
