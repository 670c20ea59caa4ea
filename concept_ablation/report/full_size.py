"""Pictures of the page in full size, as files beside it: the enlarged picture becomes one of them where the page holds a smaller thumbnail.

The page stays one file that opens anywhere: without the folder, it enlarges its thumbnails. The page's script makes the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, features

from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import open_store
from concept_ablation.report.figures import THUMBNAIL

FOLDER = "figures/pictures"
"""Where they lie, as the page says it."""

QUALITY = 90
"""Of WebP, 0 to 100: a picture of 512 pixels takes some tens of kB, a fraction of its PNG in the image store."""


class FullSize:
    """The folder of a page's pictures in full size, named KEY.POSITION.webp by the image store and the place in it."""

    def __init__(self, report: Path) -> None:
        self.folder = report / FOLDER
        self.kept: set[str] = set()

    def keep(self, key: str, position: int, picture: Image.Image) -> None:
        """Write a picture, once."""
        name = f"{key}.{position}.webp"
        if name in self.kept:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_output(self.folder / name) as part:
            picture.convert("RGB").save(part, format="WEBP", quality=QUALITY, method=2)
        self.kept.add(name)

    def remove_others(self) -> None:
        """Remove what an earlier page showed and this one doesn't."""
        for file in self.folder.glob("*.webp"):
            if file.name not in self.kept:
                file.unlink()


def full_size_of(rows: Sequence[Mapping], report: Path) -> FullSize | None:
    """For the page of these rows in the folder `report`; None where a thumbnail is as large as a picture, or Pillow lacks WebP.

    Raises StoreError.
    """
    samples = open_store(rows[0]["samples"]) if rows and features.check("webp") else ()
    larger = len(samples) > 0 and max(samples.image(0).size) > THUMBNAIL  # all of a table have one size
    return FullSize(report) if larger else None
