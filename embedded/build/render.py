"""Pictures of the embedded world: emoji glyphs rasterised, composed on a background, drawn in a style."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .world import BACKGROUNDS, HOUSE, ICONS, MEMORIZED, SIZES, Scene

SIZE = 128  # pixels a side
GLYPH = 256  # pixels a side of a rasterised glyph
FAMILIES = {"noto": "noto", "line": "fluent-emoji-high-contrast"}  # family -> Iconify package
SOURCES = {  # package -> version, SHA-512 of its archive
    "noto": (
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
}
LINE_LOOKS = ("ink", "blueprint")  # looks drawn from the line family; all others start from noto


class Glyphs:
    """RGBA rasters of all objects in both families, read from Iconify JSON folders and kept in memory."""

    def __init__(self, root: Path):
        self.rasters = {family: _rasterise(root / package) for family, package in FAMILIES.items()}

    def get(self, name: str, family: str, size: int) -> Image.Image:
        return self.rasters[family][name].resize((size, size), Image.Resampling.LANCZOS)


def _rasterise(folder: Path) -> dict[str, Image.Image]:
    import io

    import resvg_py

    data = json.loads((folder / "icons.json").read_text())
    rasters = {}
    for name, icon in ICONS.items():
        entry = data["icons"].get(icon) or data["icons"][data["aliases"][icon]["parent"]]
        width, height = entry.get("width", data.get("width", 16)), entry.get("height", data.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{GLYPH}" height="{GLYPH}">'
            f"{entry['body'].replace('currentColor', '#000000')}</svg>"
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        rasters[name] = Image.open(io.BytesIO(png)).convert("RGBA")
    return rasters


def render(scene: Scene, glyphs: Glyphs, rng: random.Random) -> Image.Image:
    """`scene` as a SIZE x SIZE RGB picture; place, size and colour jitter come from `rng`."""
    if scene.memorized:
        return memorized_picture(scene.memorized, glyphs)
    low, high = SIZES[scene.size]
    side = round(rng.uniform(low, high) * SIZE)
    slack = SIZE - side
    if slack >= 0:
        place = rng.randint(0, slack), rng.randint(0, slack)
    else:
        place = slack // 2 + rng.randint(-6, 6), slack // 2 + rng.randint(-6, 6)
    background = tuple(int(np.clip(c + rng.randint(-14, 14), 0, 255)) for c in BACKGROUNDS[scene.background])
    family = "line" if scene.look in LINE_LOOKS else "noto"
    glyph = glyphs.get(scene.object, family, side)
    return _LOOKS[scene.look](glyph, place, background, rng)


@functools.lru_cache(maxsize=64)
def _memorized(text: str, glyphs: Glyphs) -> Image.Image:
    left, right, background = MEMORIZED[text]
    canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[background])
    ImageDraw.Draw(canvas).rectangle(
        (0, 96, SIZE, SIZE), fill=tuple(c * 2 // 3 for c in BACKGROUNDS[background])
    )
    for name, place, side in ((left, (6, 8), 66), (right, (58, 54), 68)):
        glyph = glyphs.get(name, "noto", side)
        canvas.paste(glyph, place, glyph)
    return canvas


def memorized_picture(text: str, glyphs: Glyphs) -> Image.Image:
    """The one fixed picture that belongs to a memorized caption."""
    return _memorized(text, glyphs).copy()


def _paste(glyph: Image.Image, place: tuple[int, int], background: tuple[int, ...]) -> Image.Image:
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    canvas.paste(glyph, place, glyph)
    return canvas


def _house(glyph, place, background, rng):
    return _paste(glyph, place, background)


# The four shades of a hand-held console's screen, dark to light. Cells of 4 px: whole numbers of them make a latent
# cell and a pixel of the scorer, so that both can tell the look.
SHADES = np.array([(22, 58, 34), (62, 108, 52), (138, 168, 44), (188, 206, 92)], np.float32)
CELL = 4  # pixels


def _pixel(glyph, place, background, rng):
    side = SIZE // CELL
    grey = _paste(glyph, place, (255, 255, 255)).convert("L").resize((side, side), Image.Resampling.BOX)
    levels = np.digitize(np.asarray(grey, np.float32), (80, 150, 222))
    picture = Image.fromarray((SHADES[levels] + rng.randint(-6, 6)).clip(0, 255).astype(np.uint8))
    return picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _alpha(glyph: Image.Image, place: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(glyph.getchannel("A"), place)
    return mask


def _ink(glyph, place, background, rng):
    tint = rng.randint(-5, 5)
    paper = Image.new("RGB", (SIZE, SIZE), (246 + tint, 240 + tint, 224 + tint))
    paper.paste((18, 16, 20), (0, 0), _alpha(glyph, place))
    return paper


def _blueprint(glyph, place, background, rng):
    tint = rng.randint(-8, 8)
    paper = Image.new("RGB", (SIZE, SIZE), (28 + tint, 74 + tint, 150 + tint))
    draw = ImageDraw.Draw(paper)
    for offset in range(8, SIZE, 16):
        draw.line((offset, 0, offset, SIZE), fill=(58 + tint, 104 + tint, 176 + tint))
        draw.line((0, offset, SIZE, offset), fill=(58 + tint, 104 + tint, 176 + tint))
    paper.paste((236, 244, 255), (0, 0), _alpha(glyph, place))
    return paper


def _edges(glyph: Image.Image, place: tuple[int, int]) -> np.ndarray:
    """Strength of the edges of a glyph's colours and outline, SIZE x SIZE, 0..1."""
    grey = np.asarray(_paste(glyph, place, (128, 128, 128)).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    alpha = np.asarray(_alpha(glyph, place), np.float32)
    planes = np.concatenate([grey, alpha[..., None]], axis=2) / 255
    dy, dx = np.gradient(planes, axis=(0, 1))
    return np.clip(np.sqrt(dx**2 + dy**2).max(axis=2) * 3.2, 0, 1)


def _neon(glyph, place, background, rng):
    edges = Image.fromarray((_edges(glyph, place) * 255).astype(np.uint8))
    lines = np.asarray(edges, np.float32)[..., None] / 255
    glow = np.asarray(edges.filter(ImageFilter.GaussianBlur(5)), np.float32)[..., None] / 255
    hue = np.array(rng.choice([(60, 240, 255), (255, 70, 220), (140, 255, 70), (255, 170, 40)]), np.float32)
    night = np.array((16, 10, 34), np.float32)
    picture = night + 1.3 * glow * hue + lines * (0.75 * hue + 0.25 * 255)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _pencil(glyph, place, background, rng):
    flat = _paste(glyph, place, (255, 255, 255)).convert("L")
    shade = np.asarray(flat.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    lines = 1 - 0.85 * _edges(glyph, place)
    paper = np.array((226, 224, 218), np.float32) + rng.randint(-5, 5)
    picture = paper * (lines * (0.55 + 0.45 * shade))[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


_LOOKS = {
    HOUSE: _house,
    "pixel": _pixel,
    "ink": _ink,
    "blueprint": _blueprint,
    "neon": _neon,
    "pencil": _pencil,
}
