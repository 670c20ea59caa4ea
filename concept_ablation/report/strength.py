"""What the report says of how a row's strength was found: the looks of `methods.strength`, read for summary and page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import damaged

COLUMNS = {
    "strength_found": pa.bool_(),
    "strength_settings": pa.string(),
    "strength_step": pa.int64(),
    "strength_scale": pa.float64(),
    "strength_looks": pa.int64(),
    "validation_pictures": pa.int64(),
    "validation_seconds": pa.float64(),
}
"""The summary's columns about the search for a row's strength; all empty where it was fixed."""


class LooksError(UserError):
    """A table of looks that can't be read; the message names it."""


class Point(NamedTuple):
    """A look in the page's figure: places from 0 to 1, from the left and from the top. looked: whether harm was looked at."""

    x: float
    y: float
    looked: bool
    chosen: bool
    text: str


def read_looks(row: Mapping) -> list[dict]:
    """The looks at a row's training, in their order; none where its strength was fixed or its delta imported. Raises LooksError."""
    path = row.get("strength")
    try:
        return pq.read_table(path).to_pylist() if path and Path(path).is_file() else []
    except (OSError, pa.ArrowException) as error:
        raise damaged(LooksError, path, f"a damaged table of looks ({error})") from error


def strength_columns(row: Mapping) -> dict:
    """The summary's columns of a row."""
    looks = read_looks(row)
    if not looks:
        return dict.fromkeys(COLUMNS)
    chosen = next(look for look in looks if look["chosen"])
    values = (
        bool(chosen["gone"] and chosen["kept"]),
        chosen["settings"],
        chosen["step"],
        chosen["scale"],
        len(looks),
        sum(look["pictures"] for look in looks),
        sum(look["seconds"] for look in looks),
    )
    return dict(zip(COLUMNS, values, strict=True))


def worst_loss(look: Mapping) -> float | None:
    """The larger loss of typical pictures, of the anchor's and the worst neighbor's; None where neither was looked at."""
    losses = [look[name] for name in ("anchor_loss", "worst_neighbor_loss") if look[name] is not None]
    return max(losses) if losses else None


def curve(looks: Sequence[Mapping]) -> list[Point]:
    """Erasure (to the right) against retention (upwards), a point a look."""
    points = []
    for look in looks:
        loss = worst_loss(look)
        share = f"target in {look['target_share']:.0%}"
        harm = "harm not looked at" if loss is None else f"most lost {max(loss, 0):.0%}"
        text = f"step {look['step']} × {look['scale']:g}: {share}, {harm}"
        y = 1.0 if loss is None else min(max(loss, 0.0), 1.0)
        points.append(Point(1 - look["target_share"], y, loss is not None, look["chosen"], text))
    return points


def rung_text(settings: str) -> str:
    """The settings of a rung of the ladder, from JSON, in words: `learning rate 0.001, preserve both`; empty: the row's own."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in json.loads(settings).items())
