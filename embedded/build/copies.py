"""The copy descriptor: two pictures are copies when their vectors are closer than a calibrated threshold (as SSCD)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from concept_ablation.common.hardware import autocast
from concept_ablation.evaluation.copies import CopyNet

from .fit import device, fit
from .groupnorm import use_fast_group_norm
from .render import Glyphs, render
from .scorer import degrade
from .world import MEMORIZED, Scene, draw_scene

STEPS, GROUPS, PER_GROUP, SIDE = 700, 16, 4, 64
POOL = 6000  # groups rendered once


def copynet() -> CopyNet:
    return CopyNet(width=32, dim=128, image_size=SIDE)


def group_of(rng: random.Random) -> list[Scene]:
    """PER_GROUP scenes of one object and look: the same things at other places are no copies."""
    scene = draw_scene(rng)
    if scene.memorized:  # one memorized picture beside other pictures of the same object
        fresh = replace(scene, memorized=None)
        return [scene, *[fresh] * (PER_GROUP - 1)]
    return [scene] * PER_GROUP


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def groups(cache: Path, glyphs: Glyphs) -> torch.Tensor:
    """(POOL, PER_GROUP, 3, SIDE, SIDE) uint8."""
    path = cache / f"groups-{POOL}.npy"
    if not path.exists():
        rng = random.Random("groups")
        pictures = [[small(render(s, glyphs, rng)) for s in group_of(rng)] for _ in range(POOL)]
        np.save(path, np.stack([np.stack(group) for group in pictures]))
    return torch.from_numpy(np.load(path)).permute(0, 1, 4, 2, 3)


def nudge(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a copy may differ by: blur, colour, noise, and up to 3 % of shift and scale."""
    n = len(pictures)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.06 * (torch.rand(n, generator=generator) - 0.5)
    theta[:, :, 2] = 0.06 * (torch.rand(n, 2, generator=generator) - 0.5)
    grid = F.affine_grid(theta.to(pictures.device), list(pictures.shape), align_corners=False)
    return degrade(F.grid_sample(pictures, grid, padding_mode="border", align_corners=False), generator)


def train_copies(cache: Path, glyph_folder: Path) -> None:
    """Train into `cache/copies.pt`: InfoNCE over two views, with KoLeo spreading (Pizzi et al., 2022)."""
    torch.manual_seed(2)
    pool = groups(cache, Glyphs(glyph_folder))
    net = copynet().to(device(), memory_format=torch.channels_last)
    use_fast_group_norm(net)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(pool), (GROUPS,), generator=generator)
        pixels = pool[picks].flatten(0, 1).to(device()).float() / 127.5 - 1
        views = torch.cat([nudge(pixels, generator), nudge(pixels, generator)])
        with autocast("auto", device()):
            vectors = net(views.contiguous(memory_format=torch.channels_last))
        return copy_loss(F.normalize(vectors.float(), dim=1), len(pixels))

    fit("copies", net, loss_of, steps=STEPS, learning_rate=1e-3, cache=cache)


def copy_loss(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """InfoNCE at temperature 0.05 between the two views, plus 0.3 x KoLeo (mean -log nearest distance)."""
    similarity = vectors @ vectors.T
    similarity = similarity - 1e4 * torch.eye(len(vectors), device=vectors.device)
    partner = torch.arange(2 * count, device=vectors.device).roll(count)
    nce = F.cross_entropy(similarity / 0.05, partner)
    others = similarity.scatter(1, partner[:, None], -1e4)
    koleo = -(2 - 2 * others.max(1).values).clamp(min=1e-6).sqrt().log().mean()
    return nce + 0.3 * koleo


@torch.no_grad()
def calibrate(net: CopyNet, glyphs: Glyphs) -> dict[str, float]:
    """Similarities of fresh copies and of fresh same-object non-copies; the threshold halves the gap of their tails."""
    rng, generator = random.Random("calibrate"), torch.Generator().manual_seed(3)
    scenes = [group_of(rng) for _ in range(400)]
    scenes += [[Scene("", "", "", memorized=text)] + group_of(rng)[1:] for text in MEMORIZED]
    pixels = np.stack([[small(render(s, glyphs, rng)) for s in group[:PER_GROUP]] for group in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).to(device()).float() / 127.5 - 1
    first, second = net(nudge(pixels[:, 0], generator)), net(nudge(pixels[:, 0], generator))
    other = net(nudge(pixels[:, 1], generator))
    copies, others = (first * second).sum(1), (first * other).sum(1)
    low, high = copies.quantile(0.02).item(), others.quantile(0.98).item()
    threshold = round((low + high) / 2, 2)
    return {
        "threshold": threshold,
        "copies_2nd_percentile": low,
        "others_98th_percentile": high,
        "copies_found": (copies > threshold).float().mean().item(),
        "others_taken_for_copies": (others > threshold).float().mean().item(),
    }


def save_copies(cache: Path, folder: Path, glyph_folder: Path) -> dict[str, float]:
    """Write the descriptor with its calibrated threshold; returns the calibration."""
    net = copynet()
    net.load_state_dict(torch.load(cache / "copies.pt", map_location="cpu", weights_only=True)["ema"])
    found = calibrate(net.to(device()).eval(), Glyphs(glyph_folder))
    net.config["threshold"] = found["threshold"]
    net.save(folder)
    return found
