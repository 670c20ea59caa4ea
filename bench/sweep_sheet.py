"""All rows of a report's table as one picture, each before and after: `python bench/sweep_sheet.py results/sweep/report-default/index.html docs/sweep.jpg`."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PREVIEW = re.compile(
    r'<th scope="row" data-sort="([^"]+)">.*?base64,([^"]+)".*?base64,([^"]+)"'
)  # a row's name, the first picture by the base model, the same seed's by the ablated one
COLUMNS, SIDE, GAP, LABEL = 9, 72, 8, 22  # rows a line; pixels


def sheet(page: str) -> Image.Image:
    """The previews of a report's page, in the order of its table."""
    found, font = PREVIEW.findall(page), ImageFont.load_default(12)
    width, height = 2 * SIDE + 2 + GAP, SIDE + LABEL
    lines = -(-len(found) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * width, lines * height), "white")
    pen = ImageDraw.Draw(whole)
    for place, (name, *pictures) in enumerate(found):
        left, top = place % COLUMNS * width, place // COLUMNS * height
        for column, picture in enumerate(pictures):
            image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
            whole.paste(
                image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left + column * (SIDE + 2), top)
            )
        pen.text((left, top + SIDE + 2), name.partition("-")[2].replace("-", " "), (24, 26, 32), font)
    return whole


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    sheet(source.read_text(encoding="utf-8")).save(out, quality=85)
