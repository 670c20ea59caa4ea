"""Plots as SVG texts, for the page and as files for papers: the parts of all, the map of harm, a row's pictures.

A plot brings its own colours, dark on nothing, and marks its parts with classes, by which the page's style recolours them.
All texts are escaped.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from concept_ablation.report.figures import Strip
from concept_ablation.report.formatting import whole_points

COLORS = {"good": "#14704a", "warn": "#885200", "bad": "#b03020", "open": "#595c65"}
QUIET = "#5d6169"
FONT = 'font-family="system-ui, sans-serif"'


def matrix_figure(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Mapping | None]]
) -> str:
    """A map: removed concepts down, subjects across, a cell's loss as its tone and in points; a frame where it is harmed."""
    side, left, top = (
        30,
        10 + 6.6 * max(map(len, rows), default=1),
        16 + 5.4 * max(map(len, columns), default=1),
    )
    size = left + side * len(columns) + 60, top + side * len(rows) + 10
    parts = [open_svg(*size, "matrix-plot", "What each removal did to other subjects")]
    for number, name in enumerate(columns):
        x = left + side * number + side / 2 + 4
        parts.append(words(x, top - 6, name, "start", f'transform="rotate(-60 {x:.1f} {top - 6:.1f})"'))
    for number, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = top + side * number
        parts.append(words(left - 6, y + side / 2 + 4, name, "end"))
        parts += [_cell(left + side * place, y, side, cell) for place, cell in enumerate(line) if cell]
    return "\n".join([*parts, "</svg>"])


def _cell(x: float, y: float, side: float, cell: Mapping) -> str:
    """One cell of the map: its tone, its frame, its number."""
    opacity = 0.6 * max(0.0, -cell["change"])
    frame = f'stroke="{COLORS["bad"]}" stroke-width="{2 if cell["harmed"] else 0.3}"'
    tone = f'fill-opacity="{opacity:.2f}" {frame}'
    number = whole_points(cell["change"])
    return rectangle("cell", x + 1, y + 1, side - 2, side - 2, COLORS["bad"], tone) + words(
        x + side / 2, y + side / 2 + 4, number, "middle", size=10
    )


def grid_figure(title: str, strips: Sequence[Strip], side: int = 128) -> str:
    """A row's pictures: of each subject a strip, the base model's above the ablated one's, a column a seed."""
    gap, left, top = 4, 150, 30
    wide = max((len(pairs) for _, pairs in strips), default=0) * (side + gap)
    parts = [
        open_svg(left + wide, top + len(strips) * (2 * side + 16), "grid-plot", title),
        words(0, 16, title, "start", 'font-weight="600"', "#1a1c20"),
    ]
    for number, (name, pairs) in enumerate(strips):
        y = top + number * (2 * side + 16)
        parts.append(
            words(0, y + 16, name if len(name) <= 24 else f"{name[:23]}…", "start", 'font-weight="600"')
        )
        parts += [
            words(left - 8, y + side / 2 + 4 + below, word, "end")
            for word, below in (("before", 0), ("after", side + gap))
        ]
        for place, pair in enumerate(pairs):
            for below, picture in enumerate(pair):
                parts.append(
                    f'<image x="{left + place * (side + gap)}" y="{y + below * (side + gap)}" width="{side}" height="{side}" '
                    f'preserveAspectRatio="xMidYMid meet" href="{_jpeg(picture, 2 * side)}"/>'
                )
    return "\n".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """A plot as a file of its own: an SVG inside a page needs no namespace, a file does."""
    return svg if "xmlns=" in svg else svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _jpeg(picture: Image.Image, side: int) -> str:
    """A picture as a data URI that other programs read, too: JPEG."""
    picture = picture.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def open_svg(width: float, height: float, name: str, label: str) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg class="{name}" {size} role="img" aria-label="{html.escape(label)}" font-size="12" {FONT}>'


def rectangle(name: str, x: float, y: float, width: float, height: float, color: str, more: str = "") -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}" {more}/>'


def line_between(name: str, x1: float, x2: float, y1: float, y2: float) -> str:
    opacity = 0.5 if name == "axis" else 0.16
    return f'<line class="{name}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{QUIET}" stroke-opacity="{opacity}"/>'


def words(
    x: float, y: float, text: str, anchor: str, more: str = "", color: str = QUIET, size: int = 12
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}" {more}>{html.escape(text)}</text>'
