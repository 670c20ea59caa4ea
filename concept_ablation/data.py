"""Training data: anchor images as tensors, with the two published scale augmentations and their masks.

An augmentation shrinks an image onto a grey canvas or crops an enlarged one, says so in a prefix for the
target prompt ("a far away ", "zoomed in "), and masks the latent cells that see the canvas.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concept_ablation.imagestore import read_store
from concept_ablation.runtime import Precision, autocast

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

Augmentation = Literal["compvis", "diffusers", "none"]
FAR_PREFIXES = ("a far away ", "very small ")
NEAR_PREFIXES = ("zoomed in ", "close up ")
FAR = 0.6  # an image smaller than this share of the canvas is called far away
RESAMPLING = {"compvis": Image.Resampling.BICUBIC, "diffusers": Image.Resampling.LANCZOS}


class DataError(ValueError):
    """Training data that can't be used; the message says why."""


@dataclass(frozen=True)
class View:
    """One image as a training step sees it.

    `pixels` (3, size, size) in [-1, 1], 0 where the canvas is empty; `mask` (1, cells, cells) of zeros and
    ones at the latents' resolution; `prefix` for the target prompt; `whole`: all of the image, unscaled.
    """

    pixels: Tensor
    mask: Tensor
    prefix: str
    whole: bool


@dataclass(frozen=True)
class Batch:
    """Views of the images at `positions`, mirrored where `flipped`; `mask` stacked: (n, 1, cells, cells)."""

    positions: list[int]
    flipped: list[bool]
    views: list[View]

    @property
    def mask(self) -> Tensor:
        return torch.stack([view.mask for view in self.views])


class AnchorData:
    """Square anchor images of one size and their prompts, in order. Raises DataError."""

    def __init__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        self.images, self.prompts = [_square(image) for image in images], list(prompts)
        sizes = {image.size for image in self.images}
        if len(sizes) != 1 or len(self.images) != len(self.prompts):
            raise DataError(
                f"{len(images)} images of sizes {sorted(sizes)} and {len(prompts)} prompts: need one size"
            )

    @classmethod
    def from_store(cls, path: str | Path) -> AnchorData:
        """The images and prompts of an image store. Raises StoreError, DataError."""
        store = read_store(path)
        return cls(list(store.images()), store.column("prompt"))

    def batches(
        self, batch_size: int, augmentation: Augmentation, hflip: float, vae_factor: int, rng: random.Random
    ) -> Iterator[Batch]:
        """Batches without end: every image once in a random order, then again in another one.

        `hflip` is the probability of mirroring, `vae_factor` the side of a latent cell in pixels.
        """
        order = _endless_shuffle(len(self.images), rng)
        while True:
            positions = [next(order) for _ in range(batch_size)]
            flipped = [rng.random() < hflip for _ in positions]
            views = []
            for position, flip in zip(positions, flipped, strict=True):
                image = self.images[position]
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
                views.append(augment(image, augmentation, vae_factor, rng))
            yield Batch(positions, flipped, views)


def augment(image: Image.Image, form: Augmentation, vae_factor: int, rng: random.Random) -> View:
    """A view of a square RGB image at its own size, by one of the published forms.

    Two thirds of the draws scale to size/3 .. size, one third to 1.2 .. 1.4 x size. `compvis` leaves images
    from 0.6 to 1 x size as they are, `diffusers` pastes and masks them too; `none` never scales, and masks
    nothing.
    """
    if form not in get_args(Augmentation):
        raise DataError(f"augmentation {form!r} is unknown (allowed: {', '.join(get_args(Augmentation))})")
    size = image.width
    mask = torch.ones(1, size // vae_factor, size // vae_factor)
    scale = size if form == "none" else _draw_scale(form, size, rng)
    if form == "none" or (form == "compvis" and FAR * size <= scale <= size):
        return View(_to_tensor(image), mask, "", whole=True)
    pixels = _to_tensor(image.resize((scale, scale), RESAMPLING[form]))
    top, left = (rng.randrange(abs(size - scale) + 1) for _ in range(2))
    if scale > size:
        pixels = pixels[:, top : top + size, left : left + size]
        return View(pixels, mask, rng.choice(NEAR_PREFIXES), whole=False)
    canvas = torch.zeros(3, size, size)
    canvas[:, top : top + scale, left : left + scale] = pixels
    mask = torch.zeros_like(mask)
    mask[:, _inner_cells(top, scale, vae_factor), _inner_cells(left, scale, vae_factor)] = 1
    return View(canvas, mask, rng.choice(FAR_PREFIXES) if scale < FAR * size else "", whole=False)


def _draw_scale(form: Augmentation, size: int, rng: random.Random) -> int:
    """The side in pixels that an image is scaled to. `compvis` makes it even."""
    shrink = rng.random() < (2 / 3 if form == "compvis" else 0.66)
    scale = rng.randint(size // 3, size) if shrink else rng.randrange(int(1.2 * size), int(1.4 * size))
    return scale + scale % 2 if form == "compvis" else scale


def _inner_cells(start: int, extent: int, vae_factor: int) -> slice:
    """The latent cells of a stretch of pixels, less one at each end; at least the middle one."""
    first, last = start // vae_factor + 1, (start + extent) // vae_factor - 1
    if first < last:
        return slice(first, last)
    middle = (start + extent // 2) // vae_factor
    return slice(middle, middle + 1)


def _endless_shuffle(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def _square(image: Image.Image) -> Image.Image:
    """The middle square of an image, RGB."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


class Encoder:
    """The pipeline's text encoder and VAE encoder, without gradient, each distinct input encoded once.

    That holds because neither is trained by the parameter groups of the UNet.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, precision: Precision = "fp32") -> None:
        self.pipeline, self.precision = pipeline, precision
        self._texts: dict[str, Tensor] = {}
        self._moments: dict[tuple[int, bool], Tensor] = {}

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Encodings of prompts, (n, tokens, width), as the pipeline makes them when it samples."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            encoded, _ = self.pipeline.encode_prompt(new, self.pipeline.device, 1, False)
            self._texts.update(zip(new, encoded, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    @torch.no_grad()
    def latents(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Latents of a batch's views, (n, channels, cells, cells), drawn from the VAE's posterior, scaled."""
        described = zip(batch.positions, batch.flipped, batch.views, strict=True)
        keys = [(position, flip) if view.whole else None for position, flip, view in described]
        moments = {i: self._moments[key] for i, key in enumerate(keys) if key in self._moments}
        new = [i for i in range(len(keys)) if i not in moments]
        if new:
            vae, device = self.pipeline.vae, self.pipeline.device
            pixels = torch.stack([batch.views[i].pixels for i in new]).to(device)
            with autocast(self.precision, device):
                moments.update(zip(new, vae.encode(pixels).latent_dist.parameters.float(), strict=True))
        self._moments.update({keys[i]: moments[i] for i in new if keys[i] is not None})
        mean, log_variance = torch.stack([moments[i] for i in range(len(keys))]).chunk(2, dim=1)
        spread = (0.5 * log_variance.clamp(-30, 20)).exp()
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return (mean + spread * noise) * self.pipeline.vae.config.scaling_factor
