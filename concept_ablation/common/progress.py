"""Progress of a job's long loops: a bar in the terminal, or a small file that another process shows.

The process that shows all jobs of a run (`report/terminal.py`) names a folder in the environment (`VARIABLE`), which jobs pass on to
their children and SLURM to other machines. A job that finds it writes nothing to the terminal: its bars go to a file of that folder.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "CONCEPT_ABLATION_PROGRESS"
EVERY = 0.5  # seconds between two writes of a file


class Progress(NamedTuple):
    """How far a loop is: what of `unit` it does, `done` of `total` (None: unknown)."""

    text: str
    done: int
    total: int | None
    unit: str


_file: Path | None = None


def tell_progress_of(log_path: str | Path) -> bool:
    """Whether this process' bars go to a file from now on, which is that of the job with this log."""
    global _file
    folder = os.environ.get(VARIABLE)
    _file = progress_file(folder, log_path) if folder and os.path.isdir(folder) else None
    return _file is not None


def progress_file(folder: str | Path, log_path: str | Path) -> Path:
    """The file of a job's progress: named by its rule and key, as its log is."""
    log = Path(log_path)
    return Path(folder) / f"{log.parent.name}.{log.stem}"


def read_progress(folder: str | Path, log_path: str | Path) -> Progress | None:
    """How far the job with this log is; None if it has told nothing yet."""
    try:
        return Progress(*json.loads(progress_file(folder, log_path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def progress_bar(*arguments, **settings):
    """A tqdm bar. Where stderr is no terminal, it prints a line every half minute instead of ten a second."""
    from tqdm import tqdm

    if _file is None:
        return tqdm(*arguments, mininterval=0.1 if sys.stderr.isatty() else 30, **settings)

    class Told(tqdm):
        """A bar that writes its state to the job's file."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if msg != "":  # so tqdm wipes a bar
                _write(
                    Progress(self.desc.removesuffix(": ") if self.desc else "", self.n, self.total, self.unit)
                )

    return Told(*arguments, mininterval=EVERY, file=io.StringIO(), **settings)


def _write(progress: Progress) -> None:
    """Replace the job's file. What can't be written is left: a full disk mustn't end a job here."""
    if _file is None:
        return
    part = _file.with_name(f"{_file.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(progress), encoding="utf-8")
        os.replace(part, _file)
    except OSError:
        pass
