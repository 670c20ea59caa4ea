"""Put the trained parts together as the folders that ship: fp16 safetensors, loaded by the libraries' own loaders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPTokenizer

from . import dit
from .fit import trained
from .render import Glyphs
from .text import load_text
from .unet import NOISE, new_unet, normalised_vae


def finished_vae(cache: Path, glyph_folder: Path) -> torch.nn.Module:
    name = "decoder" if (cache / "decoder.pt").exists() else "vae"
    return normalised_vae(cache, name, Glyphs(glyph_folder)).to("cpu")


def save_pipeline(cache: Path, folder: Path, glyph_folder: Path) -> None:
    """Write `folder` as a whole StableDiffusionPipeline; an older one there is replaced at the end."""
    tokenizer, text_encoder = load_text(cache)
    pipeline = StableDiffusionPipeline(
        vae=finished_vae(cache, glyph_folder),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=trained(cache, "unet", new_unet()),
        scheduler=DPMSolverMultistepScheduler(**NOISE, prediction_type="epsilon", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, folder, cache)


def save_dit(cache: Path, folder: Path, glyph_folder: Path) -> None:
    """Write `folder` as a whole StableDiffusion3Pipeline without T5; an older one there is replaced at the end."""
    tokenizer = CLIPTokenizer.from_pretrained(cache / "tokenizer", model_max_length=dit.TOKENS)
    encoder, vae = dit.new_projecting_encoder(cache), finished_vae(cache, glyph_folder)
    vae.register_to_config(shift_factor=0.0)  # the pipeline subtracts it
    pipeline = StableDiffusion3Pipeline(
        transformer=trained(cache, "dit", dit.new_dit()),
        scheduler=FlowMatchEulerDiscreteScheduler(**dit.NOISE),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    _save(pipeline, folder, cache)


def _save(pipeline, folder: Path, cache: Path) -> None:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16, memory_format=torch.contiguous_format)
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    # else transformers loads them in fp16, diffusers the rest in fp32
    for config in fresh.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for place in fresh.glob("tokenizer*"):  # newer transformers save tokenizer.json alone
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(cache / "tokenizer" / file, place / file)
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
