"""Put the trained parts together as the folders that ship: fp16 safetensors, loaded by the libraries' own loaders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from .render import Glyphs
from .text import load_text
from .unet import NOISE, new_unet, normalised_vae


def load_unet(cache: Path) -> torch.nn.Module:
    """The EMA weights of the newest U-Net checkpoint."""
    unet = new_unet()
    unet.load_state_dict(torch.load(cache / "unet.pt", map_location="cpu", weights_only=True)["ema"])
    return unet


def save_pipeline(cache: Path, folder: Path, glyph_folder: Path) -> None:
    """Write `folder` as a whole StableDiffusionPipeline; an older one there is replaced at the end."""
    name = "decoder" if (cache / "decoder.pt").exists() else "vae"
    tokenizer, text_encoder = load_text(cache)
    pipeline = StableDiffusionPipeline(
        vae=normalised_vae(cache, name, Glyphs(glyph_folder)).to("cpu"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=load_unet(cache),
        scheduler=DPMSolverMultistepScheduler(**NOISE, prediction_type="epsilon", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.to(torch.float16, memory_format=torch.contiguous_format)
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    config = (
        fresh / "text_encoder" / "config.json"
    )  # else transformers loads it in fp16, diffusers the rest in fp32
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for file in ("vocab.json", "merges.txt"):  # newer transformers save tokenizer.json alone
        shutil.copy(cache / "tokenizer" / file, fresh / "tokenizer" / file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def sheet(images: list, columns: int, side: int = 128, gap: int = 4):
    """A contact sheet of PIL images, row by row."""
    from PIL import Image

    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), (255, 255, 255))
    for i, image in enumerate(images):
        place = gap + i % columns * (side + gap), gap + i // columns * (side + gap)
        page.paste(image.resize((side, side)), place)
    return page
