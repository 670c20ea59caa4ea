"""Sample images from prompts and seeds. An image's noise depends on its own seed alone.

Each image has its own generator, on the CPU. So neither the batch nor the device changes what is random; they change
roundings. docs/design.md says what is equal to what.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from concept_ablation.common.errors import UserError
from concept_ablation.common.hardware import Precision, autocast, check_precision
from concept_ablation.common.parts import timed
from concept_ablation.common.progress import progress_bar
from concept_ablation.diffusion.families.base import family_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

log = logging.getLogger(__name__)


class SamplerError(UserError):
    """A sampler setting that isn't known; the message lists what is allowed."""


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: Mapping[str, object],
    batch_size: int,
    negative_prompt: str | None = None,
    progress: str | None = None,
) -> Iterator[Image]:
    """Yield one RGB image for each prompt and its seed, in order.

    `sampler`: `scheduler` (one of the family's `schedulers` or `default`, the pipeline's own), `steps`, `guidance_scale`
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


@timed("pictures")
def _sample_batch(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Mapping[str, object],
    negative_prompt: str | None,
) -> list[Image]:
    family, own_scheduler = family_of(pipeline), pipeline.scheduler
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    pipeline.scheduler = make_scheduler(own_scheduler, str(sampler["scheduler"]), family.schedulers)
    try:
        with (
            _mixed_precision(family.network(pipeline), sampler["precision"], pipeline.device),
            _one_at_a_time(pipeline.vae),
        ):
            return family.sample(pipeline, prompts, generators, sampler, negative_prompt)
    finally:
        pipeline.scheduler = own_scheduler


def make_scheduler(own: Any, name: str, known: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Any:
    """A fresh scheduler called `name`, one of `known` or `default`, with the noise schedule of `own`.

    Raises SamplerError.
    """
    if name == "default":
        return type(own).from_config(own.config)
    if name not in known:
        raise SamplerError(f"scheduler {name!r} is unknown (allowed: {', '.join(['default', *known])})")
    kind, settings = known[name]
    return getattr(importlib.import_module("diffusers.schedulers"), kind).from_config(own.config, **settings)


@contextlib.contextmanager
def _mixed_precision(network: torch.nn.Module, precision: Precision, device: torch.device) -> Iterator[None]:
    """Let `network` compute in `precision` and answer in fp32.

    Guidance and the scheduler then compute in fp32, and so does the VAE, whose steps of half precision would
    show as grey levels that depend on the batch.
    """
    check_precision(network, precision, device)
    forward = network.forward

    def mixed(*inputs, **named) -> tuple[torch.Tensor, ...]:
        with autocast(precision, device):
            return tuple(part.float() for part in forward(*inputs, **named))

    frozen = [value for value in network.parameters() if not value.requires_grad]
    network.forward = mixed
    try:
        # autocast drops its half-precision copies of weights when the outermost context ends, and keeps those alone whose weights
        # ask for a gradient. So one context around all steps, and all weights ask: a step casts none again.
        with torch.autocast(device.type, enabled=False):
            for value in frozen:
                value.requires_grad_(True)
            yield
    finally:
        network.forward = forward
        for value in frozen:
            value.requires_grad_(False)


@contextlib.contextmanager
def _one_at_a_time(vae: torch.nn.Module) -> Iterator[None]:
    """Inside, `vae` decodes image by image: a whole batch, in fp32, would need more memory than all the rest.

    Outside it doesn't, since such a VAE also encodes one by one. A VAE that has no such switch decodes whole batches.
    """
    own, decode = getattr(vae, "use_slicing", False), vae.decode

    def decode_alone(*inputs, **named) -> object:
        torch.clear_autocast_cache()  # the network has answered: its half-precision copies would take memory beside the decoding
        return decode(*inputs, **named)

    vae.use_slicing, vae.decode = True, decode_alone
    try:
        yield
    finally:
        vae.use_slicing = own
        del vae.decode
