"""Write files atomically, report damaged ones and set them aside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CURE = (
    "; delete it and run again"  # ends the message about a damaged file; replaced where the file is set aside
)


@contextlib.contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It is moved to `path` when the block ends, and removed if it fails.

    So `path` is either the whole new file or what it was before, also after a power cut. Missing folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_end(path: str | Path, size: int = 4096) -> str:
    """The last `size` bytes of a text file; an empty text where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def damaged(kind: type[ValueError], path: str | Path, why: str) -> ValueError:
    """An error of class `kind` that says `why` the file at `path` is damaged; its attribute `damaged` is that path."""
    error = kind(f"{path}: {why}{CURE}")
    error.damaged = Path(path)
    return error


def set_aside(path: str | Path) -> Path:
    """Rename a damaged file to `NAME.damaged`. It is then missing, so the next run makes it again."""
    aside = Path(f"{path}.damaged")
    with contextlib.suppress(FileNotFoundError):  # another job did it first
        os.replace(path, aside)
    return aside
