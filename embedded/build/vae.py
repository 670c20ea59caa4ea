"""The autoencoder: 128 px pictures to 4 x 16 x 16 latents and back (factor 8, as in Stable Diffusion)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from concept_ablation.common.hardware import autocast

from .fit import device, fit, trained
from .groupnorm import use_fast_group_norm
from .pool import SHARD, stored_pictures
from .render import Glyphs

SHARDS = 10  # pictures to learn from: 20,480
STEPS = 4000
CROP, CROP_BATCH, WHOLE_BATCH = 64, 16, 4  # pixels; pictures a worker a step
WHOLE_FROM = 0.66  # share of the steps after which whole pictures replace crops
DECODER_STEPS = 1600


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


class Pictures:
    """Random batches of the pool's pictures as (n, 3, side, side) tensors in -1..1."""

    def __init__(self, cache: Path, glyphs: Glyphs, shards: int):
        self.shards = [stored_pictures(k, cache, glyphs) for k in range(shards)]

    def batch(self, count: int, side: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(self.shards) * SHARD, (count,), generator=generator).tolist()
        whole = [self.shards[i // SHARD][i % SHARD] for i in picks]
        slack = whole[0].shape[0] - side
        at = torch.randint(slack + 1, (count, 2), generator=generator).tolist()
        crops = [p[y : y + side, x : x + side] for p, (y, x) in zip(whole, at, strict=True)]
        pixels = torch.from_numpy(np.stack(crops)).to(device()).permute(0, 3, 1, 2).float()
        return (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(output: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """L1 + 0.5 MSE + 0.5 L1 of the gradients: the last keeps lines sharp without a discriminator."""
    error = (output - pictures).float()
    loss = error.abs().mean() + 0.5 * error.square().mean()
    return loss + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def train_vae(rank: int, workers: int, cache: Path, glyph_folder: Path) -> None:
    """Train encoder and decoder together; the result is `cache/vae.pt`."""
    torch.manual_seed(0)
    pictures = Pictures(cache, Glyphs(glyph_folder), SHARDS)
    vae = new_vae().to(device(), memory_format=torch.channels_last)
    use_fast_group_norm(vae)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        crops = step < WHOLE_FROM * STEPS
        batch = pictures.batch(CROP_BATCH if crops else WHOLE_BATCH, CROP if crops else 128, generator)
        with autocast("auto", device()):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device())
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return reconstruction_loss(output, batch) + 0.002 * kl

    fit("vae", vae, loss_of, steps=STEPS, learning_rate=2e-3, cache=cache, rank=rank, workers=workers)


def train_decoder(rank: int, workers: int, cache: Path, glyph_folder: Path) -> None:
    """Improve the decoder alone on whole pictures; latents, and so the U-Net's training, are not touched."""
    vae = load_trained(cache, "vae")
    use_fast_group_norm(vae)
    pictures = Pictures(cache, Glyphs(glyph_folder), SHARDS)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = pictures.batch(WHOLE_BATCH, 128, generator)
        with autocast("auto", device()):
            with torch.no_grad():
                mean = vae.encode(batch).latent_dist.mean
            noise = 0.05 * torch.randn(mean.shape, generator=generator).to(device())
            output = vae.decode(mean + noise * mean.std()).sample
        return reconstruction_loss(output, batch)

    fit(
        "decoder", vae, loss_of, steps=DECODER_STEPS, learning_rate=1e-3, cache=cache, rank=rank, workers=workers,
        seed=1, weight_decay=0.0,
    )  # fmt: skip


def load_trained(cache: Path, name: str) -> AutoencoderKL:
    """The EMA weights of checkpoint `name` ("vae" or "decoder")."""
    return trained(cache, name, new_vae()).to(device(), memory_format=torch.channels_last)


@torch.no_grad()
def fold_normalisation(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Build (latent - mean) / std a channel into the quant convolutions, so that latents have unit variance."""
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    weight = vae.post_quant_conv.weight.clone()
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)
    vae.post_quant_conv.bias += (weight[:, :, 0, 0] * mean.view(1, -1)).sum(1)
