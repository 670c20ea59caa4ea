"""Training data: anchor images as tensors, with the two published scale augmentations and their masks.

An augmentation shrinks an image onto a grey canvas or crops an enlarged one. A prefix of the target prompt says so ("a far
away ", "zoomed in "), and a mask covers the latent cells that see the canvas.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concept_ablation.common.errors import UserError
from concept_ablation.common.image_store import read_store
from concept_ablation.diffusion.families.base import Frame

Augmentation = Literal["compvis", "diffusers", "none"]
FAR_PREFIXES = ("a far away ", "very small ")
NEAR_PREFIXES = ("zoomed in ", "close up ")
FAR = 0.6  # an image smaller than this share of the canvas is called far away
RESAMPLING = {"compvis": Image.Resampling.BICUBIC, "diffusers": Image.Resampling.LANCZOS}


class DataError(UserError):
    """Training data that can't be used; the message says why."""


@dataclass(frozen=True)
class View:
    """One image as a training step sees it.

    `pixels` (3, size, size) in [-1, 1], 0 where the canvas is empty; `mask` (1, cells, cells) of zeros and
    ones at the latents' resolution; `prefix` for the target prompt; `whole`: all of the image, unscaled; `cut`: how far
    from the top and the left of the enlarged image it was cut, in pixels.
    """

    pixels: Tensor
    mask: Tensor
    prefix: str
    whole: bool
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Batch:
    """Views of the images at `positions`, mirrored where `flipped`; `mask` stacked: (n, 1, cells, cells)."""

    positions: list[int]
    flipped: list[bool]
    views: list[View]

    @property
    def frames(self) -> list[Frame]:
        """Of each view the side of the image that it shows, which no augmentation gives more detail, and where it was cut."""
        return [(view.pixels.shape[-1], *view.cut) for view in self.views]

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
        self,
        batch_size: int,
        augmentation: Augmentation,
        hflip: float,
        vae_factor: int,
        rng: random.Random,
        mask_border: bool = False,
    ) -> Batches:
        """Batches without end: every image once in a random order, then again in another one.

        `hflip` is the probability of mirroring, `vae_factor` the side of a latent cell in pixels.
        """
        return Batches(self, batch_size, hflip, rng, (augmentation, vae_factor, rng, mask_border))


class Batches:
    """Batches of views without end. `remaining`: the positions still to come before the next shuffle.

    With `remaining` and its random generator's state put back, it goes on exactly where it was.
    """

    def __init__(
        self, data: AnchorData, batch_size: int, hflip: float, rng: random.Random, augmentation: tuple
    ) -> None:
        self.data, self.batch_size, self.hflip, self.rng = data, batch_size, hflip, rng
        self.augmentation = augmentation
        self.remaining: list[int] = []

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        positions = [self._next_position() for _ in range(self.batch_size)]
        flipped = [self.rng.random() < self.hflip for _ in positions]
        views = []
        for position, flip in zip(positions, flipped, strict=True):
            image = self.data.images[position]
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            views.append(augment(image, *self.augmentation))
        return Batch(positions, flipped, views)

    def _next_position(self) -> int:
        if not self.remaining:
            count = len(self.data.images)
            self.remaining = self.rng.sample(range(count), count)
        return self.remaining.pop(0)


def augment(
    image: Image.Image,
    form: Augmentation,
    vae_factor: int,
    rng: random.Random,
    mask_border: bool = False,
) -> View:
    """A view of a square RGB image at its own size, by one of the published forms.

    Two thirds of the draws scale to size/3 .. size, one third to 1.2 .. 1.4 x size. `compvis` leaves images
    from 0.6 to 1 x size as they are, `diffusers` pastes and masks them too; `none` never scales.
    `mask_border` masks the cells at the border of an unscaled image, as the diffusers code does.
    """
    size = image.width
    scale = size if form == "none" else _draw_scale(form, size, rng)
    if scale == size or (form == "compvis" and FAR * size <= scale <= size):
        border = (0, 0, size) if mask_border else None
        return View(_to_tensor(image), _mask(size, vae_factor, border), "", whole=True)
    pixels = _to_tensor(image.resize((scale, scale), RESAMPLING[form]))
    top, left = (rng.randrange(abs(size - scale) + 1) for _ in range(2))
    if scale > size:
        pixels = pixels[:, top : top + size, left : left + size]
        return View(pixels, _mask(size, vae_factor), rng.choice(NEAR_PREFIXES), whole=False, cut=(top, left))
    canvas = torch.zeros(3, size, size)
    canvas[:, top : top + scale, left : left + scale] = pixels
    prefix = rng.choice(FAR_PREFIXES) if scale < FAR * size else ""
    return View(canvas, _mask(size, vae_factor, (top, left, scale)), prefix, whole=False)


def _mask(size: int, vae_factor: int, pasted: tuple[int, int, int] | None = None) -> Tensor:
    """(1, cells, cells): ones inside a square pasted at (top, left, side) in pixels; all ones if there's none."""
    shape = (1, size // vae_factor, size // vae_factor)
    if pasted is None:
        return torch.ones(shape)
    top, left, side = pasted
    mask = torch.zeros(shape)
    mask[:, _inner_cells(top, side, vae_factor), _inner_cells(left, side, vae_factor)] = 1
    return mask


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


def _square(image: Image.Image) -> Image.Image:
    """The middle square of an image, RGB; an image that is so already isn't copied."""
    if image.mode == "RGB" and image.width == image.height:
        return image
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
