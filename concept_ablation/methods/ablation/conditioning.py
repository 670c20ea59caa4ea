"""Encode a training's prompts and images. What isn't trained is encoded once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.hardware import Precision, autocast
from concept_ablation.diffusion.families.base import Conditioning, family_of
from concept_ablation.diffusion.placeholders import filled
from concept_ablation.methods.ablation.data import Batch, View

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from concept_ablation.methods.ablation.token_embeddings import TrainableTokenEmbeddings

# How much is encoded at once on a GPU. So many pixels take 5.4 GB with Stable Diffusion's VAE in fp32, less than a
# training on them takes.
PIXELS_AT_ONCE = 8 * 512 * 512
TEXTS_AT_ONCE = 64


class Encoder:
    """A pipeline's text encoders and VAE encoder; what isn't trained is encoded once for each distinct input.

    On a CPU each input is encoded alone, so that its encoding doesn't depend, in its last bits, on the rest of the batch, and a training
    that goes on after it was killed is the same (docs/performance.md says what that costs). Elsewhere as many are encoded at once as `PIXELS_AT_ONCE` and `TEXTS_AT_ONCE` allow. `embeddings`: the token embeddings that are trained, if they are.
    `found`: the embeddings of placeholders that prompts may name, by text encoder (count, width); one that was encoded stays as it is.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        precision: Precision = "fp32",
        embeddings: TrainableTokenEmbeddings | None = None,
    ) -> None:
        self.pipeline, self.family = pipeline, family_of(pipeline)
        self.precision, self.embeddings = precision, embeddings
        self.found: dict[str, Tensor] = {}
        self._texts: dict[str, Conditioning] = {}
        self._moments: dict[tuple[int, bool], Tensor] = {}

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of n prompts, by the text encoders as they were before training."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._texts))
        size = self._at_once(TEXTS_AT_ONCE)
        for start in range(0, len(new), size):
            chunk = new[start : start + size]
            encoded = self._encode(chunk)
            # In the machine's memory: a prompt of Stable Diffusion 3 has 5.5 MB, and there may be a thousand.
            self._texts |= {prompt: encoded[i : i + 1].to("cpu") for i, prompt in enumerate(chunk)}
        found = Conditioning.join([self._texts[prompt] for prompt in prompts])
        return found.to(self.pipeline.device)

    def hidden(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """(n, tokens, width): the same hidden states, of n prompts at a time. They aren't kept, since there may be thousands."""
        size = self._at_once(TEXTS_AT_ONCE)
        for start in range(0, len(prompts), size):
            yield self._encode(prompts[start : start + size]).hidden

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        original = self.embeddings.active(original=True) if self.embeddings else contextlib.nullcontext()
        with original, filled(self.pipeline, self.found):
            return self.family.encode_prompts(self.pipeline, prompts)

    def current_text(self, prompts: Sequence[str]) -> Conditioning:
        """The same by the text encoders as they are now, with gradient if they are trained."""
        if self.embeddings is None:
            return self.text(prompts)
        with self.embeddings.active():
            return self.family.encode_prompts(self.pipeline, prompts)

    def framed(self, conditioning: Conditioning, batch: Batch) -> Conditioning:
        """The conditioning of n prompts for a batch's n views: a network that is told how pictures are cut is told the truth."""
        return self.family.framed(conditioning, batch.frames)

    @torch.no_grad()
    def latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """Latents of a batch's views, as the network takes them: drawn from the VAE's posterior with `noise`.

        Both are (n, channels, cells, cells).
        """
        return self.family.latents(self.pipeline, self._moments_of(batch), noise)

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
        found: dict[object, Tensor] = {}
        for start in range(0, len(new), chunk):
            part = list(new)[start : start + chunk]
            found |= zip(part, self._encode_views([new[key] for key in part]), strict=True)
        self._moments.update((key, moments) for key, moments in found.items() if new[key].whole)
        return torch.stack([found[key] if key in found else self._moments[key] for key in keys])

    def _encode_views(self, views: Sequence[View]) -> Tensor:
        device = self.pipeline.device
        pixels = torch.stack([view.pixels for view in views]).to(device)
        with autocast(self.precision, device):
            return self.family.encode_pixels(self.pipeline, pixels)

    def _at_once(self, limit: int) -> int:
        """How many inputs are encoded at once on this device, if `limit` of them fit."""
        return 1 if self.pipeline.device.type == "cpu" else max(1, limit)
