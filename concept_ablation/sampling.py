"""Sampling: images from prompts and seeds, each from noise of its own whatever is drawn beside it.

The pipeline itself samples; each image has its own generator on the CPU, so that neither the batch size nor
the device's random numbers enter, only their roundings: docs/design.md says what is equal to what. The stages that
write image stores are below.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from concept_ablation.imagestore import write_store
from concept_ablation.models import apply_delta, load_pipeline
from concept_ablation.prompts import read_prompts
from concept_ablation.runtime import Precision, autocast, progress_bar, resolve_precision

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


class SamplerError(ValueError):
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


def load_model(model: Mapping, device: str) -> StableDiffusionPipeline:
    """The pipeline that a spec's `model` names: `path`, `revision` and, if set, `config`, `allow_custom_code`."""
    return load_pipeline(
        model["path"],
        model["revision"],
        device,
        model.get("config"),
        allow_custom_code=model.get("allow_custom_code", False),
    )


def generate_anchors(
    spec: Mapping,
    prompts_path: str | Path,
    out_path: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Stage `generate_anchors`: images of the anchor's prompts by the unchanged model.

    The prompts' `target_prompts`, if any, go on into the store's metadata. Where the spec names a memorized picture
    (`image` and `descriptor`), copies of it are left out; they are counted as `copies_dropped` in the metadata. Raises
    SamplerError, and for a memorized picture MemorizationError and FeatureError.
    """
    written = read_prompts(prompts_path)
    pipeline = load_model(spec["model"], device)
    probe = {"role": None, "subject": None, "prompts": written["prompts"], "seed": spec["seed"]}
    draw = functools.partial(
        _draw,
        pipeline,
        sampler=spec["sampler"],
        batch_size=batch_size,
        negative_prompt=spec.get("negative_prompt"),
        progress=Path(out_path).stem,
    )
    metadata = {name: written[name] for name in ("target_prompts",) if name in written}
    if "image" in spec:
        # memorization imports this module.
        from concept_ablation.memorization import CopyJudge, without_copies

        judge = CopyJudge(spec["image"], spec["descriptor"], pipeline.device)
        rows, dropped = without_copies(draw([{**probe, "images": 2 * spec["images"]}]), spec["images"], judge)
        metadata["copies_dropped"] = dropped
    else:
        rows = draw([{**probe, "images": spec["images"]}])
    _write(out_path, rows, pipeline, spec, metadata)


def sample_base(spec: Mapping, out_path: str | Path, *, device: str = "auto", batch_size: int = 16) -> None:
    """Stage `sample_base`: one probe's images by the unchanged model, without a role: rows share them."""
    _sample_probes(spec, [{"role": None, **spec["probe"]}], out_path, device=device, batch_size=batch_size)


def sample_ablated(
    spec: Mapping, delta_path: str | Path, out_path: str | Path, *, device: str = "auto", batch_size: int = 16
) -> None:
    """Stage `sample_ablated`: all probes of a row by the model with its delta, one after the other."""
    _sample_probes(
        spec, spec["probes"], out_path, delta_path=delta_path, device=device, batch_size=batch_size
    )


def _sample_probes(
    spec: Mapping,
    probes: Sequence[Mapping],
    out_path: str | Path,
    *,
    delta_path: str | Path | None = None,
    device: str,
    batch_size: int,
) -> None:
    """Sample `probes` into one store, by the unchanged model or with its delta."""
    pipeline = load_model(spec["model"], device)
    delta = None if delta_path is None else apply_delta(pipeline, delta_path)
    rows = _draw(
        pipeline, probes, sampler=spec["sampler"], batch_size=batch_size, progress=Path(out_path).stem
    )
    _write(out_path, rows, pipeline, spec, {"delta_metadata": delta})


def _draw(pipeline: StableDiffusionPipeline, probes: Sequence[Mapping], **options) -> Iterator[dict]:
    """Rows with images; image i of a probe has prompt i (modulo their number), seed + i. `options`: sample_images'."""
    rows = list(_probe_rows(probes))
    images = sample_images(
        pipeline, [row["prompt"] for row in rows], [row["seed"] for row in rows], **options
    )
    for row, image in zip(rows, images, strict=True):
        yield {**row, "image": image}


def _write(
    path: str | Path, rows: Iterable[dict], pipeline: StableDiffusionPipeline, spec: Mapping, extra: Mapping
) -> None:
    """Write a store whose metadata is the spec, `extra`, and what the images were computed on."""
    precision = resolve_precision(spec["sampler"]["precision"], pipeline.device)
    metadata = {**spec, "device": pipeline.device.type, "precision": precision, **extra}
    count = write_store(path, rows, metadata)
    log.info("wrote %d images to %s (%s, %s)", count, path, pipeline.device, precision)


def _probe_rows(probes: Sequence[Mapping]) -> Iterator[dict]:
    for probe in probes:
        for index in range(probe["images"]):
            prompt = probe["prompts"][index % len(probe["prompts"])]
            named = {"role": probe["role"], "subject": probe["subject"]}
            yield {"prompt": prompt, "seed": probe["seed"] + index, "index": index, **named}
