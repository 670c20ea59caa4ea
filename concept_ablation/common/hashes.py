"""SHA-256 of files and models, whose content names the results. Whole files are read, but only once they changed.

Snakemake reads the workflow for every command, and a model has gigabytes. So a hash is kept in the working directory, under
the file's real path, with the file's size, times and inode: where these are the same, the file isn't read. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from pathlib import Path

from concept_ablation.common.files import atomic_output

log = logging.getLogger(__name__)
KEPT = Path(".snakemake") / "hashes"  # one small file for each file that was hashed
# The files of a model's folder that decide what it does: configuration, vocabulary, chat template, weights, code.
MODEL_FILES = {".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".pt", ".ckpt", ".py"}
SMALL = 2**20  # bytes; to read less is as quick as to look up its hash
LARGE = 500 * 10**6  # bytes; to read more takes so long that a line tells of it
# A file system's clock ticks in steps, of two seconds at most: what changes twice within one step has the same times.
STEP = 2 * 10**9  # nanoseconds


def fingerprint(path: str, keep: bool = False) -> str:
    """12 hex digits that change with a model's content: that of one file, or of a folder's MODEL_FILES and their names.

    `keep`: as for `file_hash`. Raises OSError for what can't be read.
    """
    digest = hashlib.sha256()
    for name, file in _model_files(path):
        digest.update(os.fsencode(name) + b"\0" + file_hash(file, keep).encode())
    return digest.hexdigest()[:12]


def file_hash(path: str, keep: bool = False) -> str:
    """The SHA-256 of a file's content, 64 hex digits: a kept one if the file is as it was, else the file is read.

    `keep`: keep what was read for the next process. If that can't be done, nothing is said. Raises OSError.
    """
    found = os.stat(path)
    if found.st_size >= SMALL and (kept := _find(path, found)):
        return kept
    started = time.time_ns()
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_size >= LARGE:
            log.warning(
                "%s: reading its %.1f GB, whose SHA-256 names the results; it is read again only when it changes",
                path,
                found.st_size / 1e9,
            )
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settled = started - max(found.st_mtime_ns, found.st_ctime_ns) > STEP
    if keep and settled and found.st_size >= SMALL:
        with contextlib.suppress(OSError), atomic_output(_place(path)) as part:
            part.write_text(f"{_state(found)} {digest}")
    return digest


def _model_files(path: str) -> list[tuple[str, str]]:
    """Name and path of each file that counts, sorted; links are followed, but not back to a folder that they lie in."""
    if os.path.isfile(path):
        return [("", path)]
    found = []
    for folder, folders, names in os.walk(path, onerror=_fail, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to((here / name).resolve())]
        for name in names:
            file = os.path.join(folder, name)
            if os.path.splitext(name)[1] in MODEL_FILES and os.path.isfile(file):
                found.append((os.path.relpath(file, path), file))
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def _place(path: str) -> Path:
    """Where the hash of the file at `path` is kept."""
    return KEPT / hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def _state(found: os.stat_result) -> str:
    """What a change changes: a copy can keep a file's size, time and inode, but not the time of its last change of any kind."""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _find(path: str, found: os.stat_result) -> str | None:
    """The kept hash of the file at `path`, if it is whole and of this state of the file."""
    try:
        kept = _place(path).read_bytes()
    except OSError:
        return None
    match = re.fullmatch(_state(found).encode() + rb" ([0-9a-f]{64})", kept)
    return match[1].decode() if match else None
