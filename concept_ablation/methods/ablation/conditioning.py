"""Encodings of a training's prompts and pictures; what isn't trained is encoded once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.hardware import Precision, autocast
from concept_ablation.methods.ablation.data import Batch, View

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    from concept_ablation.methods.ablation.token_embeddings import TokenRows

# What is encoded at once on a GPU. Of pixels: 5.4 GB with Stable Diffusion's VAE in fp32, less than training on them takes.
PIXELS_AT_ONCE = 8 * 512 * 512


TEXTS_AT_ONCE = 64


class Encoder:
    """A pipeline's text encoder and VAE encoder; what isn't trained is encoded once for each distinct input.

    On a CPU each input is encoded alone: so its encoding doesn't depend, in the last bits, on what came in the same
    batch, and pictures at once aren't quicker there. Elsewhere as many at once as `PIXELS_AT_ONCE` and `TEXTS_AT_ONCE`
    allow. `rows`: the rows of the token embedding that are trained, if they are.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, precision: Precision = "fp32", rows: TokenRows | None = None
    ) -> None:
        self.pipeline, self.precision, self.rows = pipeline, precision, rows
        self._texts: dict[str, Tensor] = {}
        self._moments: dict[tuple[int, bool], Tensor] = {}

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Encodings of prompts, (n, tokens, width), by the text encoder as it was before training."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._texts))
        with self.rows.active(original=True) if self.rows else contextlib.nullcontext():
            encodings = _in_chunks(self._encode, new, self._at_once(TEXTS_AT_ONCE))
        self._texts.update(zip(new, encodings, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def current_text(self, prompts: Sequence[str]) -> Tensor:
        """The same by the text encoder as it is now, with gradient if it is trained."""
        if self.rows is None:
            return self.text(prompts)
        with self.rows.active():
            return self._encode(prompts)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return self.pipeline.encode_prompt(list(prompts), self.pipeline.device, 1, False)[0]

    @torch.no_grad()
    def latents(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Latents of a batch's views, (n, channels, cells, cells), drawn from the VAE's posterior, scaled."""
        mean, log_variance = self._moments_of(batch).chunk(2, dim=1)
        spread = (0.5 * log_variance.clamp(-30, 20)).exp()
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return (mean + spread * noise) * self.pipeline.vae.config.scaling_factor

    def _moments_of(self, batch: Batch) -> Tensor:
        """Means and log variances of the views' posteriors; those of whole images are kept."""
        places = list(zip(batch.positions, batch.flipped, strict=True))
        # A scaled view is the only one of its kind: its key is its number in the batch.
        keys = [
            place if view.whole else n
            for n, (place, view) in enumerate(zip(places, batch.views, strict=True))
        ]
        new = {key: view for key, view in zip(keys, batch.views, strict=True) if key not in self._moments}
        chunk = self._at_once(PIXELS_AT_ONCE // batch.views[0].pixels[0].numel())
        found = dict(zip(new, _in_chunks(self._encode_views, list(new.values()), chunk), strict=True))
        self._moments.update((key, moments) for key, moments in found.items() if new[key].whole)
        return torch.stack([found[key] if key in found else self._moments[key] for key in keys])

    def _encode_views(self, views: Sequence[View]) -> Tensor:
        device = self.pipeline.device
        pixels = torch.stack([view.pixels for view in views]).to(device)
        with autocast(self.precision, device):
            return self.pipeline.vae.encode(pixels).latent_dist.parameters.float()

    def _at_once(self, limit: int) -> int:
        """How many inputs are encoded at once, of which `limit` would fit."""
        return 1 if self.pipeline.device.type == "cpu" else max(1, limit)


def _in_chunks(encode: Callable[[Sequence], Tensor], inputs: Sequence, size: int) -> list[Tensor]:
    """The encoding of each input, `size` of them encoded at once."""
    return [row for start in range(0, len(inputs), size) for row in encode(inputs[start : start + size])]
