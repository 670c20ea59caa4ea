"""Which images are copies of one memorized picture."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from concept_ablation.common.errors import UserError
from concept_ablation.common.image_store import PictureError, open_picture
from concept_ablation.evaluation.copies import CopyDescriptor

log = logging.getLogger(__name__)


class MemorizationError(UserError):
    """The picture can't be used, or too few prompts were found; the message says what to do."""


class CopyJudge:
    """Tells which images are copies of one memorized picture.

    Args:
        image: `file`, the picture, and `sha256`, of the file when the work was planned.
        descriptor: `model` and `sha256`, as CopyDescriptor takes them.

    Raises:
        MemorizationError: the picture is missing, was changed, or is no picture.
        FeatureError: the descriptor can't be loaded.
    """

    def __init__(self, image: Mapping[str, str], descriptor: Mapping, device="cpu") -> None:
        picture = read_picture(image["file"], image["sha256"])
        self.descriptor = CopyDescriptor(descriptor["model"], device, descriptor.get("sha256"))
        self.picture = self.descriptor.features([picture])[0]

    def similarity(self, images: Iterable[Image.Image], batch_size: int = 64) -> np.ndarray:
        """(n,) cosine similarities with the picture, -1..1."""
        return self.descriptor.features(images, batch_size) @ self.picture

    def is_copy(self, similarity: np.ndarray | float) -> np.ndarray | bool:
        """True where a similarity is that of a copy."""
        return self.descriptor.is_copy(similarity)


def read_picture(file: str, sha256: str) -> Image.Image:
    """The picture in `file`, which must still be the planned one. Raises MemorizationError."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise MemorizationError(f"{file}: the memorized picture can't be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise MemorizationError(f"{file}: was changed after this run was planned; start it again")
    try:
        return open_picture(io.BytesIO(content))
    except PictureError as error:
        raise MemorizationError(f"{file}: is no picture that can be read ({error})") from None


def without_copies(rows: Iterator[Mapping], wanted: int, judge: CopyJudge) -> tuple[list[dict], int]:
    """The first `wanted` rows whose `image` is no copy, counted anew in `index`, and how many copies lay between them.

    A row's prompt and seed stay as they are. Rows are drawn no further than needed, and held in memory: only at the
    end it is known whether they serve. Raises MemorizationError if fewer than half of `wanted` are left.
    """
    kept, dropped = [], 0
    with contextlib.closing(rows):
        while len(kept) < wanted and (chunk := list(itertools.islice(rows, wanted - len(kept)))):
            copies = judge.is_copy(judge.similarity(row["image"] for row in chunk))
            own = [row for row, copy in zip(chunk, copies, strict=True) if not copy]
            kept += [{**row, "index": len(kept) + place} for place, row in enumerate(own)]
            dropped += len(chunk) - len(own)
    if len(kept) < wanted / 2:
        raise MemorizationError(
            f"{dropped} of {len(kept) + dropped} anchor images are copies of the memorized picture, and only "
            f"{len(kept)} of {wanted} are left: lower anchor_max, or write anchor prompts that are further from it"
        )
    if dropped:
        log.warning("%d anchor images are copies of the memorized picture and are left out", dropped)
    if len(kept) < wanted:
        log.warning("%d of %d anchor images are left", len(kept), wanted)
    return kept, dropped
