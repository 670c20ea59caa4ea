"""Files that are whole or absent, and what becomes of a damaged one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CURE = "; delete it and run again"  # of a damaged file, where nobody sets it aside


@contextlib.contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: moved to `path` at the end, removed if the block fails.

    So `path` is either the whole new file or as it was before, also after a power cut. Folders are made.
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


def damaged(kind: type[ValueError], path: str | Path, why: str) -> ValueError:
    """An error of `kind` that says `why` the file at `path` is no good; its attribute `damaged` is that path."""
    error = kind(f"{path}: {why}{CURE}")
    error.damaged = Path(path)
    return error


def set_aside(path: str | Path) -> Path:
    """Rename a damaged file to `NAME.damaged` beside it, so that it is missing and the next run makes it anew."""
    aside = Path(f"{path}.damaged")
    with contextlib.suppress(FileNotFoundError):  # another job was quicker
        os.replace(path, aside)
    return aside
