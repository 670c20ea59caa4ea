"""The report's drawings: interval bars, sparklines, thumbnails, strips of pictures."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

Strip = tuple[str, Sequence[tuple[Image.Image, Image.Image]]]
"""A subject's name and its pictures: pairs of the base model's and the ablated one's, a pair a seed."""

THUMBNAIL = 192
"""Longest side of a picture on the page and in a card, in pixels."""

GAP = 4
"""Pixels between the pictures of a strip."""


@dataclass(frozen=True)
class Bar:
    """A measured value beside its limit, with the interval that decides; all are places on the bar, 0 (left) to 1 (right).

    before: the base model's value. zone: from where to where the value has to lie, the limit being one of its ends.
    more_left, more_right: the interval goes on beyond that end of the bar.
    """

    before: float
    value: float
    low: float
    high: float
    limit: float
    zone: tuple[float, float]
    more_left: bool = False
    more_right: bool = False


def target_bar(line: Mapping) -> Bar:
    """A summary line's deciding target on a bar from 0 to 100 %: its share, with the interval that decides, and its limit."""
    limit = line["target_limit"]
    values = [limit + line[f"target_excess{end}"] for end in ("", "_low", "_high")]
    value, low, high, limit = (_inside(place) for place in (*values, limit))
    return Bar(_inside(line["deciding"].base), value, low, high, limit, (0.0, limit))


def change_bar(line: Mapping, column: str, loss_max: float) -> Bar | None:
    """The paired change of a share, `<column>_change`, beside the loss that is allowed; None where it was not measured.

    The bar reaches from four times that loss (at most 100 points) to half as much gained, so that the limit is always in sight.
    """
    if line.get(f"{column}_change") is None:
        return None
    left = -min(1.0, 4 * max(loss_max, 0.01))
    value, low, high, limit, before = (
        (place - left) / (-1.5 * left)
        for place in (*(line[f"{column}_change{end}"] for end in ("", "_low", "_high")), -loss_max, 0.0)
    )
    places = [_inside(place) for place in (before, value, low, high, limit)]
    return Bar(*places, (places[-1], 1.0), low < 0, high > 1)


def _inside(place: float) -> float:
    return min(max(place, 0.0), 1.0)


def sparkline(values: Sequence[float], width: float, height: float, most: int = 160) -> str:
    """Points of an SVG polyline through at most `most` averages of `values`, the least at the bottom."""
    finite = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if not len(finite):
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(most, len(finite)))])
    scaled = (means - means.min()) / max(float(np.ptp(means)), 1e-12)
    across = np.linspace(0, width, len(means)) if len(means) > 1 else np.array([0.0])
    return " ".join(f"{x:.1f},{height * (1 - y):.1f}" for x, y in zip(across, scaled, strict=True))


PLAIN = {"badge": "", "first": True, "worst": None, "more": {}}
"""What the page shows beside a pair of pictures of which no record says how they were judged."""


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> str:
    """A picture as a data URI, WebP (JPEG where Pillow lacks it), at most `size` pixels on its longer side."""
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    kind, buffer = ("WEBP" if features.check("webp") else "JPEG"), io.BytesIO()
    image.save(buffer, format=kind, quality=82, method=2)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_strip(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size as one picture, each at most THUMBNAIL pixels long."""
    first = rows[0][0]
    scale = min(1.0, THUMBNAIL / max(first.size))
    width, height = (max(1, round(side * scale)) for side in first.size)
    size = (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    strip = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            strip.paste(small, (x * (width + GAP), y * (height + GAP)))
    return strip


def grid_picture(title: str, strips: Sequence[Strip]) -> Image.Image:
    """What `plots.grid_figure` draws, as a picture: of each subject a strip, the base model's above the ablated one's, a column a seed.

    Pictures have at most THUMBNAIL pixels a side. Letters that Pillow's own font lacks are boxes; the SVG has them.
    """
    longest = max((max(picture.size) for _, pairs in strips for pair in pairs for picture in pair), default=0)
    side, left, top = min(THUMBNAIL, longest), 170, 34
    wide, high = max((len(pairs) for _, pairs in strips), default=0) * (side + GAP), 2 * (side + GAP) + 12
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    grid = Image.new(
        "RGB", (left + max(wide, round(bold.getlength(title)) - left), top + len(strips) * high), "white"
    )
    pen = ImageDraw.Draw(grid)
    pen.text((4, 6), title, "#1a1c20", bold)
    for number, (name, pairs) in enumerate(strips):
        y = top + number * high
        pen.text((4, y), name if len(name) <= 24 else f"{name[:23]}…", "#1a1c20", plain)
        for below, word in enumerate(("before", "after")):
            middle = y + below * (side + GAP) + side // 2
            pen.text((left - 8, middle), word, "#5d6169", plain, anchor="rm")
            for place, pair in enumerate(pairs):
                small = pair[below].convert("RGB")
                small.thumbnail((side, side), Image.Resampling.LANCZOS)
                grid.paste(small, (left + place * (side + GAP), middle - side // 2))
    return grid


COLORS = ("#2563a8", "#c2571a", "#3a7d44", "#8a4a9e", "#6b6b6b", "#a33d4a", "#1c7f86")
"""Of the lines of a curve, in turn."""


def curve_figure(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """An SVG of panels side by side, each with a line a name through its points: n, on an axis of equal ratios, and a share.

    Names and titles are escaped.
    """
    width, height, left, top = 200, 120, 40, 26
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    counts = sorted({n for lines in panels.values() for points in lines.values() for n, _ in points})
    spread = math.log(counts[-1] / counts[0]) if len(counts) > 1 else 1.0
    full = (len(panels) * (width + left + 16), height + top + 30 + 16 * len(names))
    head = f'viewBox="0 0 {full[0]} {full[1]}" width="{full[0]}" height="{full[1]}" role="img" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {head} font-family="system-ui, sans-serif" fill="currentColor">'
    ]
    for number, (title, lines) in enumerate(panels.items()):
        x0 = number * (width + left + 16) + left

        def place(n: int, share: float, x0: int = x0) -> tuple[float, float]:
            across = math.log(n / counts[0]) / spread if len(counts) > 1 else 0.5
            return x0 + width * across, top + height * (1 - _inside(share))

        parts.append(f'<text x="{x0}" y="14" font-weight="600">{html.escape(title)}</text>')
        for share in (0.0, 0.5, 1.0):
            y = top + height * (1 - share)
            parts.append(
                f'<line x1="{x0}" x2="{x0 + width}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".18"/>'
            )
            parts.append(f'<text x="{x0 - 4}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
        parts += [f'<text x="{place(n, 0)[0]:.1f}" y="{top + height + 16}" text-anchor="middle">{n}</text>' for n in counts]  # fmt: skip
        for name, points in lines.items():
            color = COLORS[names.index(name) % len(COLORS)]
            at = [place(*point) for point in sorted(points)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at]
    for number, name in enumerate(names):
        y, color = top + height + 36 + 16 * number, COLORS[number % len(COLORS)]
        parts.append(f'<line x1="{left}" x2="{left + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{color}" stroke-width="3"/>')  # fmt: skip
        parts.append(f'<text x="{left + 24}" y="{y}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])
