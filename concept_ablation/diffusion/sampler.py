"""Sampling: images from prompts and seeds, each from noise of its own whatever is drawn beside it.

The pipeline itself samples; each image has its own generator on the CPU, so that neither the batch size nor
the device's random numbers enter, only their roundings: docs/design.md says what is equal to what.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from concept_ablation.common.errors import UserError
from concept_ablation.common.hardware import Precision, autocast
from concept_ablation.common.logs import progress_bar

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from PIL.Image import Image

log = logging.getLogger(__name__)


# Name in a config -> diffusers class and what it is told beyond the model's own schedule.
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}


class SamplerError(UserError):
    """A sampler setting that isn't known; the message lists what is allowed."""


def sample_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: Mapping[str, object],
    batch_size: int,
    negative_prompt: str | None = None,
    progress: str | None = None,
) -> Iterator[Image]:
    """Yield one RGB image for each prompt and its seed, in order.

    `sampler`: `scheduler` (a name in SCHEDULERS or `default`, the pipeline's own), `steps`, `guidance_scale`
    (1: none), `eta` (0..1, of ddim), `precision` (auto, fp32, bf16, fp16), `height` and `width` (pixels;
    None: the model's own). `negative_prompt`: what guidance leads away from, instead of the empty prompt.
    Image i starts from the same noise whatever `batch_size` and device; on a CPU it is the same, within one grey level,
    whatever `batch_size`. `progress` labels a progress bar. Raises SamplerError, DeviceError.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if negative_prompt and sampler["guidance_scale"] <= 1:
        raise SamplerError(
            f"the negative prompt {negative_prompt!r} does nothing without guidance: guidance_scale is "
            f"{sampler['guidance_scale']} (allowed: above 1)"
        )
    with progress_bar(total=len(prompts), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            images = _sample_batch(pipeline, prompts[batch], seeds[batch], sampler, negative_prompt)
            yield from images
            bar.update(len(images))


def _sample_batch(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Mapping[str, object],
    negative_prompt: str | None,
) -> list[Image]:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    own_scheduler = pipeline.scheduler
    pipeline.scheduler = make_scheduler(own_scheduler, str(sampler["scheduler"]))
    try:
        with (
            _mixed_precision(pipeline.unet, sampler["precision"], pipeline.device),
            _one_at_a_time(pipeline.vae),
        ):
            return pipeline(
                list(prompts),
                negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
                num_inference_steps=sampler["steps"],
                guidance_scale=sampler["guidance_scale"],
                eta=sampler["eta"],
                height=sampler["height"],
                width=sampler["width"],
                generator=generators,
            ).images
    finally:
        pipeline.scheduler = own_scheduler


def make_scheduler(own: object, name: str) -> object:
    """A fresh scheduler called `name` with the noise schedule of `own`. Raises SamplerError."""
    if name == "default":
        return type(own).from_config(own.config)
    if name not in SCHEDULERS:
        raise SamplerError(f"scheduler {name!r} is unknown (allowed: {', '.join(['default', *SCHEDULERS])})")
    kind, settings = SCHEDULERS[name]
    return getattr(importlib.import_module("diffusers.schedulers"), kind).from_config(own.config, **settings)


@contextlib.contextmanager
def _mixed_precision(unet: torch.nn.Module, precision: Precision, device: torch.device) -> Iterator[None]:
    """Let `unet` compute in `precision` and answer in fp32.

    Guidance and the scheduler then compute in fp32, and so does the VAE, whose steps of half precision would
    show as grey levels that depend on the batch.
    """
    forward = unet.forward

    def mixed(*inputs, **named) -> tuple[torch.Tensor, ...]:
        with autocast(precision, device):
            return tuple(part.float() for part in forward(*inputs, **named))

    unet.forward = mixed
    try:
        yield
    finally:
        unet.forward = forward


@contextlib.contextmanager
def _one_at_a_time(vae: torch.nn.Module) -> Iterator[None]:
    """Let `vae` decode picture by picture: a whole batch, in fp32, would need more memory than all the rest.

    Inside only, since such a VAE also encodes one by one. A kind of VAE that can't do so goes on as before.
    """
    own = getattr(vae, "use_slicing", False)
    vae.use_slicing = True
    try:
        yield
    finally:
        vae.use_slicing = own
