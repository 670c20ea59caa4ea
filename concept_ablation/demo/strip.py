"""An answer as the page shows it: a strip of pictures as HTML, and a tile of the history."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from PIL import Image, ImageFilter

from concept_ablation.demo.request import Picture, Request

TEMPLATES = Path(__file__).parent / "templates"
TILE = 128  # pixels, the side of a picture in a tile
GAP = 4  # pixels between pictures
MOST = 4  # pictures in a tile
BRACES = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def strip(request: Request, pictures: Sequence[Picture], veiled: bool, note: str) -> str:
    """HTML of an answer's pictures in a row. `veiled`: hidden until a reader asks for them. `note`: a line below."""
    shown = [
        {"title": picture.title, "image": picture.image and _address(picture.image)} for picture in pictures
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("strip.html.j2")
    return template.render(request=request, pictures=shown, veiled=veiled, note=note)


def _as_text(value: object) -> Markup:
    """A value as text of HTML. gradio fills what HTML it shows as a template in the browser, so braces are escaped as well."""
    return Markup(str(escape(value)).translate(BRACES))


def _address(image: Image.Image) -> str:
    """The picture as a PNG inside its own address."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tile(pictures: Sequence[Picture], veiled: bool) -> Image.Image:
    """The first pictures of an answer and its last side by side, small; beyond recognition if they are `veiled`."""
    images = _some([picture.image for picture in pictures if picture.image])
    made = Image.new("RGBA", (len(images) * (TILE + GAP) - GAP, TILE))
    for place, image in enumerate(images):
        small = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
        if veiled:
            # Few cells, then smoothed: nothing of the picture but its colours is in the file.
            small = image.resize((4, 4), Image.Resampling.BOX).resize((TILE, TILE), Image.Resampling.BICUBIC)
            small = small.filter(ImageFilter.GaussianBlur(TILE / 12))
        made.paste(small, (place * (TILE + GAP), 0))
    return made


def caption(request: Request, pictures: Sequence[Picture]) -> str:
    """What a tile of the history shows, in words."""
    text = " | ".join(_some([picture.title for picture in pictures]))
    text += f" and {len(pictures) - MOST} more" if len(pictures) > MOST else ""
    strength = f", strength {request.strength:g}" if request.names and request.strength != 1 else ""
    return f"{request.prompt} · seed {request.seed}: {text}{strength}"


def _some(values: Sequence) -> list:
    """All of a few values; of many the first, and the last, which is the sum if there is one."""
    return list(values) if len(values) <= MOST else [*values[: MOST - 1], values[-1]]
