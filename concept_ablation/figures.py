"""How the report writes numbers and pictures: shares, points, metrics, sparklines, thumbnails."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, features

from concept_ablation.columns import SHARES

THUMBNAIL = 192
"""Longest side of a picture on the page, in pixels."""


def share(value: float | None) -> str:
    """0.034 -> "3%"."""
    return "–" if value is None else f"{100 * value:.0f}%"


def points(value: float | None) -> str:
    """A change of a share in percentage points: -0.034 -> "−3.4"."""
    return "–" if value is None else _signed(100 * value, 1)


def format_metric(value: float | None, metric: str, change: bool = False) -> str:
    """A value of the long table as the page shows it."""
    if value is None:
        return "–"
    if metric in SHARES:
        return points(value) if change else share(value)
    digits = 3 if metric != "kid_x1000" else 0 if abs(value) >= 100 else 1
    return _signed(value, digits) if change else _signed(value, digits).removeprefix("+")


def _signed(value: float, digits: int) -> str:
    """With a sign, a true minus, and no sign where it rounds to zero."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def sparkline(values: Sequence[float], width: float, height: float, most: int = 160) -> str:
    """Points of an SVG polyline through at most `most` averages of `values`, the least at the bottom."""
    finite = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if not len(finite):
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(most, len(finite)))])
    scaled = (means - means.min()) / max(float(np.ptp(means)), 1e-12)
    across = np.linspace(0, width, len(means)) if len(means) > 1 else np.array([0.0])
    return " ".join(f"{x:.1f},{height * (1 - y):.1f}" for x, y in zip(across, scaled, strict=True))


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> str:
    """A picture as a data URI, WebP (JPEG where Pillow lacks it), at most `size` pixels on its longer side."""
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    kind, buffer = ("WEBP" if features.check("webp") else "JPEG"), io.BytesIO()
    image.save(buffer, format=kind, quality=82, method=2)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
