"""Image stores: a Parquet file of images with their prompts and seeds. Its metadata says how they were made.

Columns: `image` (struct of PNG `bytes` and a `path`, which image viewers and `datasets` understand), `prompt`, `seed`
(int64), `index` (int64, counted within a probe), `role` and `subject` (strings, null for anchor images). The metadata
is one JSON text under `concept_ablation`.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output, damaged

METADATA_KEY = b"concept_ablation"
COLUMNS = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("index", pa.int64()),
        ("role", pa.string()),
        ("subject", pa.string()),
    ]
)
# With this, `datasets.load_dataset("parquet", ...)` decodes the image column.
FEATURES = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()
ROWS_A_GROUP = 8  # images in a row group: the least that can be read at once
MAX_PIXELS = 50_000_000  # of one picture: 150 MB as RGB
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # none that Pillow opens with another program, as it does EPS


class PictureError(OSError):
    """A file is not a picture, or too large to be opened; the message says why."""


class StoreError(UserError):
    """An image store is missing or damaged; the message names the file and says what to do."""


def open_picture(source: str | Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The picture at a path or in an open file, as RGB. Its size is checked before it is decoded.

    Raises PictureError if it is in none of `formats` (Pillow's names), damaged, or has more than MAX_PIXELS pixels;
    OSError if there is no such file.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(source, formats=formats)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(
                f"{width} x {height} pixels, more than the {MAX_PIXELS} allowed: make it smaller"
            )
        return picture.convert("RGB")
    except Image.DecompressionBombError as error:
        raise PictureError(f"{error}; {MAX_PIXELS} pixels are allowed: make it smaller") from None
    except UnidentifiedImageError:
        raise PictureError(f"not a picture (allowed: {', '.join(formats)})") from None
    except (SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # what damaged files raise
        raise PictureError(str(error)) from None


def write_store(path: str | Path, rows: Iterable[Mapping], metadata: Mapping[str, object]) -> int:
    """Write `rows` to `path` as they come, all or nothing; returns their number.

    A row maps `image` to a PIL image and each other column to its value; `role` and `subject` may be missing. At most
    ROWS_A_GROUP rows are held in memory.
    """
    description = json.dumps(metadata, sort_keys=True)
    schema = COLUMNS.with_metadata({METADATA_KEY: description, b"huggingface": FEATURES})
    remaining, count = iter(rows), 0
    with atomic_output(path) as part, _writer(part, schema) as writer:
        while group := [_encode(row) for row in itertools.islice(remaining, ROWS_A_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Statistics hold a column's least and greatest value. Of the images these would be two whole pictures a row group.
    plain = [name for name in schema.names if name != "image"]
    return pq.ParquetWriter(
        path, schema, compression="none", write_page_checksum=True, write_statistics=plain
    )


def _encode(row: Mapping) -> dict:
    buffer = io.BytesIO()
    row["image"].save(buffer, format="PNG")
    image = {"bytes": buffer.getvalue(), "path": f"{row['index']:06d}.png"}
    return {"role": None, "subject": None, **row, "image": image}


def read_store(path: str | Path) -> ImageStore:
    """The image store at `path`, read whole; images are decoded when asked for. Raises StoreError."""
    if not Path(path).is_file():
        raise StoreError(f"{path}: there is no such image store")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(StoreError, path, f"a damaged image store ({error})") from error
    except KeyError:
        raise damaged(
            StoreError, path, f"a Parquet file, but no image store: it has no {METADATA_KEY!r} metadata"
        ) from None
    for field in COLUMNS:
        if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
            raise damaged(StoreError, path, f"has no {field.name!r} column of {field.type}")
    return ImageStore(table, metadata, str(path))


def open_store(path: str | Path) -> ImageStore:
    """The image store at `path`, whose images are read a few at a time, when asked for. Raises StoreError.

    Use it to show a few of many images; `read_store` reads them all.
    """
    if not Path(path).is_file():
        raise StoreError(f"{path}: there is no such image store")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])
            table = file.read([field.name for field in COLUMNS if field.name != "image"])
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return read_store(path)  # its error says what is wrong
    place = pa.array(np.arange(table.num_rows))
    return _OpenStore(table.append_column("place", place), metadata, str(path), np.cumsum([0, *groups]))


class ImageStore:
    """Rows of an image store: `table` (pyarrow), `metadata` (dict), `path`, and images by position."""

    def __init__(self, table: pa.Table, metadata: dict, path: str) -> None:
        self.table, self.metadata, self.path = table, metadata, path

    def __len__(self) -> int:
        return self.table.num_rows

    @functools.cached_property
    def rows(self) -> list[dict]:
        """All columns but the image, a dict a row."""
        return self.table.drop_columns(["image"]).to_pylist()

    def column(self, name: str) -> list:
        """One column as a list, for instance `prompt`."""
        return self.table.column(name).to_pylist()

    def png(self, position: int) -> bytes:
        """The PNG file of the image at `position` (0-based, among the selected rows)."""
        return self.table.column("image")[position].as_py()["bytes"]

    def image(self, position: int) -> Image.Image:
        """The RGB image at `position` (0-based, among the selected rows). Raises StoreError."""
        try:
            return open_picture(io.BytesIO(self.png(position)), ("PNG",))
        except (PictureError, TypeError) as error:
            raise damaged(StoreError, self.path, f"image {position} is damaged ({error})") from error

    def images(self) -> Iterator[Image.Image]:
        """All images in order, one at a time."""
        return (self.image(position) for position in range(len(self)))

    def select(self, role: str | None = None, subject: str | None = None) -> ImageStore:
        """The rows of one role, one subject, or both, in order; there may be none."""
        table = self.table
        for name, value in (("role", role), ("subject", subject)):
            if value is not None:
                table = table.filter(pc.equal(table.column(name), value))
        return self._with(table)

    def positions(self, role: str, subject: str) -> list[int]:
        """Where the rows of one probe are among these, in order."""
        places = zip(self.column("role"), self.column("subject"), strict=True)
        return [position for position, place in enumerate(places) if place == (role, subject)]

    def first(self, count: int) -> ImageStore:
        """The first `count` rows, or all if there are fewer."""
        return self._with(self.table.slice(0, count))

    def _with(self, table: pa.Table) -> ImageStore:
        return ImageStore(table, self.metadata, self.path)


class _OpenStore(ImageStore):
    """A store whose images stay in the file. Column `place`: a row's place there; `starts`: each row group's first."""

    def __init__(self, table: pa.Table, metadata: dict, path: str, starts: np.ndarray) -> None:
        super().__init__(table, metadata, path)
        self._starts = starts
        self._read: tuple[int, pa.Table | None] = -1, None

    @functools.cached_property
    def rows(self) -> list[dict]:
        return self.table.drop_columns(["place"]).to_pylist()

    def png(self, position: int) -> bytes:
        place = self.table.column("place")[position].as_py()
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        if self._read[0] != group:
            try:
                with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                    self._read = group, file.read_row_group(group, ["image"])
            except (pa.ArrowException, OSError) as error:
                raise damaged(StoreError, self.path, f"a damaged image store ({error})") from error
        return self._read[1].column("image")[place - int(self._starts[group])].as_py()["bytes"]

    def _with(self, table: pa.Table) -> ImageStore:
        return _OpenStore(table, self.metadata, self.path, self._starts)


class Pictures(list):
    """Pictures in memory, as far as what only looks at them reads a store."""

    def images(self) -> Iterator[Image.Image]:
        """The pictures in order."""
        return iter(self)
