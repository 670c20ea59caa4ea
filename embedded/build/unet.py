"""The diffusion U-Net: predicts the noise in 4 x 16 x 16 latents, given a caption's embedding."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from concept_ablation.common.hardware import autocast

from .fit import device, fit
from .groupnorm import use_fast_group_norm
from .pool import pictures_of, scenes_of
from .render import Glyphs
from .text import embed
from .vae import fold_normalisation, load_trained
from .world import Scene, all_captions, caption

SHARDS = 24  # 49,152 latents
STEPS, BATCH = 6000, 40  # pictures a worker a step
DROP = 0.1  # share of captions left empty, for classifier-free guidance
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode(vae: nn.Module, pictures: np.ndarray) -> torch.Tensor:
    """(n, 4, 16, 16) posterior means of (n, 128, 128, 3) uint8 pictures, 32 at a time."""
    means = []
    for i in range(0, len(pictures), 32):
        pixels = torch.from_numpy(pictures[i : i + 32]).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast("auto", device()):
            means.append(
                vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            )
    return torch.cat(means)


def store_normalisation(cache: Path, glyphs: Glyphs) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each latent channel over one shard, kept in `cache/latent-scale.pt`."""
    path = cache / "latent-scale.pt"
    if not path.exists():
        latents = encode(load_trained(cache, "vae"), pictures_of(0, glyphs)[:1024])
        torch.save({"mean": latents.mean((0, 2, 3)).cpu(), "std": latents.std((0, 2, 3)).cpu()}, path)
    scale = torch.load(path, weights_only=True)
    return scale["mean"], scale["std"]


def normalised_vae(cache: Path, name: str, glyphs: Glyphs) -> nn.Module:
    """Autoencoder `name` with latents of unit variance."""
    mean, std = store_normalisation(cache, glyphs)
    vae = load_trained(cache, name)
    fold_normalisation(vae, mean.to(device()), std.to(device()))
    return vae.eval()


def store_latents(rank: int, workers: int, cache: Path, glyph_folder: Path) -> None:
    """Encode the pool's shards, this worker's share of them, to `cache/latents-K.pt`."""
    glyphs = Glyphs(glyph_folder)
    vae = normalised_vae(cache, "vae", glyphs)
    for shard in range(rank, SHARDS, workers):
        path = cache / f"latents-{shard}.pt"
        if not path.exists():
            torch.save(encode(vae, pictures_of(shard, glyphs)).half().cpu(), path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)


class Batches:
    """Random latents of the pool, each with what `table` has of its caption, at the caption's place in `texts`.

    `weigh` of a scene: how much oftener than others it is drawn.
    """

    def __init__(self, cache: Path, texts: list[str], table, weigh: Callable[[Scene], float] | None = None):
        self.latents = torch.cat(
            [torch.load(cache / f"latents-{k}.pt", weights_only=True) for k in range(SHARDS)]
        )
        self.latents = self.latents.to(device())
        self.scenes = [scene for k in range(SHARDS) for scene in scenes_of(k)]
        self.weights = weigh and torch.tensor([float(weigh(scene)) for scene in self.scenes])
        self.index = {text: i for i, text in enumerate(texts)}
        self.table = table

    def draw(self, count: int, generator: torch.Generator) -> tuple:
        if self.weights is None:
            picks = torch.randint(len(self.scenes), (count,), generator=generator)
        else:
            picks = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        texts = ["" if rng.random() < DROP else caption(self.scenes[i], rng) for i in picks.tolist()]
        rows = torch.tensor([self.index[text] for text in texts], device=self.table.device)
        return self.latents[picks.to(self.latents.device)].float(), self.table[rows]


def train_unet(rank: int, workers: int, cache: Path, steps: int = STEPS) -> None:
    """Train into `cache/unet.pt`: epsilon prediction, min-SNR-5 weighting (Hang et al., 2023)."""
    torch.manual_seed(0)
    texts = all_captions()
    batches = Batches(cache, texts, embed(cache, texts))
    unet = new_unet().to(device(), memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    use_fast_group_norm(unet)
    schedule = DDPMScheduler(**NOISE)
    kept = schedule.alphas_cumprod
    weight = (torch.clamp(kept / (1 - kept), max=5) / (kept / (1 - kept))).to(device())

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        latents, states = batches.draw(BATCH * 2 // workers, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device())
        times = torch.randint(1000, (len(latents),), generator=generator).to(device())
        noisy = schedule.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        with autocast("auto", device()):
            predicted = unet(noisy, times, states).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (weight[times] * error).mean()

    fit(
        "unet", unet, loss_of, steps=steps, learning_rate=1e-3, cache=cache, rank=rank, workers=workers, save_every=250
    )  # fmt: skip
