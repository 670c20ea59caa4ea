"""Put the shipped weights back into the cache as checkpoints, to go on training them after a change of the world.

Each is entered `START` of the way through its schedule, without the optimizer's state; the text encoder and its
tokenizer count as finished, because the U-Net was trained on their output.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from concept_ablation.evaluation.copies import CopyNet

from . import copies, dit, scorer, text, unet, vae

# The share of the schedule that counts as done.
START = {"vae": 0.62, "unet": 0.75, "scorer": 0.6, "copies": 0.5, "dit": 0.6}
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def restore(root: Path, cache: Path) -> None:
    """Write `cache/NAME.pt` for every model of `root` (embedded/), and `cache/tokenizer`; replaces what is there."""
    folder = root / "emoji-diffusion"
    (cache / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / "tokenizer" / name).exists():
            shutil.copy(folder / "tokenizer" / name, cache / "tokenizer" / name)
    tokenizer = CLIPTokenizer.from_pretrained(cache / "tokenizer")
    reader = text.Reader(text.new_text_encoder(tokenizer))
    reader.encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    judge, _ = open_clip.create_model_from_pretrained(f"local-dir:{root / 'emoji-clip'}")
    parts: dict[str, tuple[nn.Module, int]] = {
        "text": (reader, text.STEPS),
        "vae": (AutoencoderKL.from_pretrained(folder / "vae"), vae.STEPS),
        "unet": (UNet2DConditionModel.from_pretrained(folder / "unet"), unet.STEPS),
        "scorer": (judge, scorer.STEPS),
        "copies": (CopyNet.load(root / "emoji-copy"), copies.STEPS),
        "dit": (SD3Transformer2DModel.from_pretrained(root / "emoji-dit" / "transformer"), dit.STEPS),
    }
    for name, (model, steps) in parts.items():
        state = {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        torch.save(
            {"model": state, "ema": state, "step": int(steps * START.get(name, 1.0))}, cache / f"{name}.pt"
        )
