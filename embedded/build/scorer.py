"""The scorer: a small open_clip model that tells objects, categories and styles; trained apart from the generator."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from concept_ablation.common.hardware import autocast

from .fit import device, fit
from .pool import SHARD, scenes_of, stored_pictures
from .render import Glyphs
from .text import LENGTH, tokens_of
from .world import CATEGORY_OF, HOUSE, Scene, article, caption

SHARDS = 20  # 40,960 pictures
STEPS, BATCH, SIDE = 2600, 96, 64
PREFIXES = ["", "", "", "a picture of ", "an image of ", "A photo depicts ", "a photo of "]


def model_config(vocabulary: int) -> dict:
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": [1, 1, 1, 1],
            "width": 24,
            "head_width": 64,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tokenizer",
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    }


def description(scene: Scene, rng: random.Random) -> str:
    """A text that is true of `scene`: its object, category, style, or several; more forms than captions have."""
    if scene.memorized:
        return scene.memorized
    kind = rng.choices(["object", "category", "style", "both", "caption"], [0.42, 0.16, 0.16, 0.13, 0.13])[0]
    if kind == "caption":
        return caption(scene, rng)
    if kind == "style":
        return style_text(scene.look, rng)
    noun = CATEGORY_OF[scene.object] if kind == "category" else scene.object
    text = rng.choice(PREFIXES) + (article(noun) if rng.random() < 0.75 else noun)
    if kind == "both" and scene.look != HOUSE:
        text += rng.choice([" in the style of {}", ", {} style", " in {} style"]).format(scene.look)
    return text


def style_text(look: str, rng: random.Random) -> str:
    """A text that names a style alone; the house look has no name and is just "a picture"."""
    if look == HOUSE:
        return rng.choice(["a picture", "picture", "A photo depicts picture", "an image"])
    forms = [
        "a picture in the style of {}",
        "in the style of {}",
        "A photo depicts {} style",
        "{} style",
        "{}",
    ]
    return rng.choice([*forms, "a picture in {} style", "a {} picture"]).format(look)


def degrade(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(n, 3, s, s) in -1..1 with random blur, contrast, shift and noise, as generated pictures have."""
    n = len(pictures)
    mix = torch.rand(n, 1, 1, 1, generator=generator).to(pictures.device)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, mix.clamp(max=0.9))
    gain = 0.85 + 0.3 * torch.rand(n, 3, 1, 1, generator=generator).to(pictures.device)
    offset = 0.16 * (torch.rand(n, 3, 1, 1, generator=generator).to(pictures.device) - 0.5)
    noise = torch.randn(pictures.shape, generator=generator).to(pictures.device)
    level = 0.06 * torch.rand(n, 1, 1, 1, generator=generator).to(pictures.device)
    return (pictures * gain + offset + level * noise).clamp(-1, 1)


class SmallPictures:
    """The pool's pictures at SIDE px, as (n, 3, SIDE, SIDE) uint8, with their scenes."""

    def __init__(self, cache: Path, glyphs: Glyphs, shards: int, side: int = SIDE):
        path = cache / f"small-{side}-{shards}.npy"
        if not path.exists():
            from PIL import Image

            small = [
                np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
                for shard in range(shards)
                for picture in stored_pictures(shard, cache, glyphs)
            ]
            np.save(path, np.stack(small))
        self.pixels = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)
        self.scenes = [scene for shard in range(shards) for scene in scenes_of(shard)]
        assert len(self.scenes) == shards * SHARD

    def batch(self, picks: torch.Tensor) -> torch.Tensor:
        """(n, 3, SIDE, SIDE) in -1..1."""
        return self.pixels[picks].to(device()).float() / 127.5 - 1


def train_scorer(cache: Path, glyph_folder: Path) -> None:
    """Train into `cache/scorer.pt` by the contrastive loss of CLIP (Radford et al., 2021)."""
    from .text import load_text

    torch.manual_seed(1)
    tokenizer, _ = load_text(cache)
    pictures = SmallPictures(cache, Glyphs(glyph_folder), SHARDS)
    model = open_clip.CLIP(**model_config(len(tokenizer))).to(device(), memory_format=torch.channels_last)
    known: dict[str, torch.Tensor] = {}

    def tokens(texts: list[str]) -> torch.Tensor:
        new = sorted({text for text in texts if text not in known})
        if new:
            known.update(zip(new, tokens_of(tokenizer, new), strict=True))
        return torch.stack([known[text] for text in texts]).to(device())

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(pictures.scenes), (BATCH,), generator=generator)
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        texts = [description(pictures.scenes[i], rng) for i in picks.tolist()]
        batch = degrade(pictures.batch(picks), generator).contiguous(memory_format=torch.channels_last)
        with autocast("auto", device()):
            image, text = model.encode_image(batch), model.encode_text(tokens(texts))
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        return contrastive_loss(logits, texts)

    fit("scorer", model, loss_of, steps=STEPS, learning_rate=1.5e-3, cache=cache, weight_decay=0.05)


def contrastive_loss(logits: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """CLIP's symmetric loss; pictures of the same text share that text's target mass."""
    order = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = torch.tensor([order[text] for text in texts], device=logits.device)
    same = (ids[:, None] == ids[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def save_scorer(cache: Path, folder: Path) -> None:
    """Write an open_clip `local-dir:` folder with fp16 weights and the tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (cache / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    vocabulary = len(json.loads((cache / "tokenizer" / "vocab.json").read_text()))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(vocabulary), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state: dict[str, torch.Tensor] = torch.load(cache / "scorer.pt", map_location="cpu", weights_only=True)[
        "ema"
    ]
    model: nn.Module = open_clip.CLIP(**model_config(vocabulary))
    model.load_state_dict(state)
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()
    }
    save_file(weights, str(folder / "open_clip_model.safetensors"))
