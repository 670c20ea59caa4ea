"""Measure the embedded models against their bars and write figures, card table and contact sheet."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.copies import CopyDescriptor

from .assemble import sheet
from .render import Glyphs, memorized_picture, render
from .world import (
    CATEGORIES,
    CATEGORY_OF,
    HOUSE,
    LOOKS,
    MEMORIZED,
    OBJECTS,
    STYLES,
    Scene,
    article,
    draw_scene,
)

# figure -> (what it is, the bar, True if it must be at least that)
BARS = {
    "scorer_object": ("scorer, 500 fresh real pictures: object top-1", 0.95, True),
    "scorer_style": ("scorer, the same: style top-1", 0.95, True),
    "object": ("generated, all objects and styles: object top-1", 0.85, True),
    "style": ("generated, the same: style top-1", 0.90, True),
    "category": ("generated, the same: the object's category is right", None, True),
    "object_plain": ("generated, prompts without a style: object top-1", None, True),
    "object_styled": ("generated, prompts with a style: object top-1", None, True),
    "memorized_copies": ("memorized captions that come back as copies", 0.90, True),
    "ordinary_copies": ("ordinary captions that come back as copies", 0.05, False),
    "seconds_an_image": ("seconds an image: default sampler, one thread, batches of 16", 0.35, False),
    "vae_psnr": ("autoencoder, 200 fresh pictures: PSNR in dB", None, True),
}
DIT_BARS = {key: (BARS[key][0], None, True) for key in BARS if not key.startswith(("scorer", "vae"))}
DIT_BARS["object"] = (BARS["object"][0], 0.75, True)


class Judge:
    """Top-1 of object, category and style by the shipped scorer."""

    def __init__(self, root: Path):
        self.scorer = ClipScorer(root / "emoji-clip")
        self.objects = self.scorer.text_features([article(name) for name in OBJECTS])
        styles = ["a picture", *(f"a picture in the style of {style}" for style in STYLES)]
        self.styles = self.scorer.text_features(styles)

    def read(self, images: list) -> tuple[list[str], list[str]]:
        features = self.scorer.image_features(images)
        objects = (features @ self.objects.T).argmax(1)
        styles = (features @ self.styles.T).argmax(1)
        return [OBJECTS[i] for i in objects], [LOOKS[i] for i in styles]


def share(truths: list[str], found: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(truths, found, strict=True)]))


def sampler_settings(*overlays: str) -> dict:
    """The evaluation sampler of config/config.yaml, with what `overlays`, files beside it, replace."""
    folder, settings = Path(__file__).resolve().parents[2] / "config", {}
    for name in ("config.yaml", *overlays):
        settings |= yaml.safe_load((folder / name).read_text())["evaluation"]["sampler"]
    return settings


def fresh_pictures(glyphs: Glyphs, count: int) -> tuple[list[Scene], list]:
    """Pictures that no training drew: single objects of normal size, all looks."""
    rng = random.Random("fresh")
    scenes = []
    while len(scenes) < count:
        scene = draw_scene(rng)
        if scene.memorized is None and scene.size == "normal":
            scenes.append(scene)
    return scenes, [render(scene, glyphs, rng) for scene in scenes]


def prompts_of_all(per_object: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts over all objects plain (`per_object` each) and all objects x styles (once), with the truths."""
    plain = [(article(name), name, HOUSE) for name in OBJECTS for _ in range(per_object)]
    styled = [
        (f"{article(name)} in the style of {style}", name, style) for name in OBJECTS for style in STYLES
    ]
    return tuple(list(part) for part in zip(*plain, *styled, strict=True))


def measure(root: Path, glyph_folder: Path, quick: bool = False) -> dict[str, float]:
    """All figures of BARS. `quick`: a third of the prompts."""
    glyphs, judge = Glyphs(glyph_folder), Judge(root)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    scenes, pictures = fresh_pictures(glyphs, 500)
    objects, styles = judge.read(pictures)
    figures["scorer_object"] = share([s.object for s in scenes], objects)
    figures["scorer_style"] = share([s.look for s in scenes], styles)
    pipeline = load_pipeline(root / "emoji-diffusion")
    figures["vae_psnr"] = psnr(pipeline.vae, pictures[:200])
    figures |= measure_drawn(root, pipeline, sampler_settings(), glyphs, judge, quick)
    return {key: round(value, 4) for key, value in figures.items()}


def measure_drawn(
    root: Path, pipeline, settings: dict, glyphs: Glyphs, judge: Judge, quick: bool
) -> dict[str, float]:
    """What a model draws: object, style and category as asked; copies of what it memorized; CPU seconds an image."""

    def draw(prompts: list[str], seed: int, label: str) -> list:
        seeds = range(seed, seed + len(prompts))
        return list(
            sample_images(pipeline, prompts, list(seeds), sampler=settings, batch_size=16, progress=label)
        )

    prompts, names, looks = (part[:: 3 if quick else 1] for part in prompts_of_all(2))
    figures, started = {}, time.process_time()
    images = draw(prompts, 1000, "objects and styles")
    figures["seconds_an_image"] = (time.process_time() - started) / len(images)
    objects, styles = judge.read(images)
    figures["object"], figures["style"] = share(names, objects), share(looks, styles)
    figures["category"] = share([CATEGORY_OF[n] for n in names], [CATEGORY_OF[n] for n in objects])
    for key, plain in (("object_plain", True), ("object_styled", False)):
        rows = [i for i, look in enumerate(looks) if (look == HOUSE) == plain]
        figures[key] = share([names[i] for i in rows], [objects[i] for i in rows])
    return figures | measure_copies(root, glyphs, draw, quick)


def measure_copies(root: Path, glyphs: Glyphs, draw, quick: bool) -> dict[str, float]:
    """How often memorized captions, and ordinary ones, give a memorized picture."""
    descriptor = CopyDescriptor(root / "emoji-copy")
    originals = descriptor.features([memorized_picture(text, glyphs) for text in MEMORIZED])
    each = 6 if quick else 20
    found = descriptor.features(draw([text for text in MEMORIZED for _ in range(each)], 5000, "memorized"))
    own = (found * np.repeat(originals, each, axis=0)).sum(1)
    related = [article(name) for left, right, _ in MEMORIZED.values() for name in (left, right)]
    related += [article(category) for category in CATEGORIES]
    others = descriptor.features(draw(related * (1 if quick else 4), 7000, "ordinary"))
    return {
        "memorized_copies": float(descriptor.is_copy(own).mean()),
        "ordinary_copies": float(descriptor.is_copy(others @ originals.T).any(1).mean()),
    }


@torch.no_grad()
def psnr(vae: torch.nn.Module, pictures: list) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB."""
    values = []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (output - pixels).square().mean()).item())
    return float(np.mean(values))


def sheet_pictures(pipeline, settings: dict):
    """12 objects, plain and in every style, the memorized captions and two categories, on one page."""
    names = ["pouting cat", "grinning cat", "owl", "penguin", "dog", "strawberry", "banana", "rocket"]
    names += ["airplane", "castle", "guitar", "robot"]
    ends = ["", *(f" in the style of {style}" for style in STYLES)]
    prompts = [article(name) + end for end in ends for name in names]
    prompts += [text for text in MEMORIZED for _ in range(2)] + ["a cat", "a bird"]
    seeds = list(range(len(prompts)))
    images = sample_images(pipeline, prompts, seeds, sampler=settings, batch_size=16, progress="sheet")
    return sheet(list(images), len(names))


def write_card(root: Path, figures: dict[str, float], part: str = "", bars: dict = BARS) -> None:
    """Put the figures into `measured.json`, under `part` if one is named, and between its marks in `README.md`."""
    file, card = root / "measured.json", root / "README.md"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= {part: figures} if part else figures
    file.write_text(json.dumps(known, indent=2) + "\n")
    lines = ["| figure | measured | bar |", "|---|---|---|"]
    for key, (text, bar, at_least) in bars.items():
        sign = "" if bar is None else (">= " if at_least else "<= ") + f"{bar:g}"
        lines.append(f"| {text} | {figures[key]:.3f} | {sign} |")
    name = f"{part} figures".strip()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = card.read_text().partition(start)
    after = rest.partition(end)[2]
    card.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{after}")
