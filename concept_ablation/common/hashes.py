"""SHA-256 of files and models, for the results' keys. A file is read whole, but only after it changed.

Snakemake reads the workflow for every command, and models have gigabytes. So hashes are cached in the working
directory, under the file's real path, together with its size, times and inode. While these stay the same, the file
isn't read again. Nothing here imports torch.
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
SMALL = 2**20  # bytes; reading a smaller file is as quick as looking up its hash
LARGE = 500 * 10**6  # bytes; reading a larger file takes so long that the log says so
# File systems record times in steps of up to two seconds: a file that changes twice within a step keeps its times.
STEP = 2 * 10**9  # nanoseconds


def fingerprint(path: str, keep: bool = False) -> str:
    """12 hex digits that change with a model's content: one file, or a folder's MODEL_FILES and their names.

    `keep`: as for `file_hash`. Raises OSError if a file can't be read.
    """
    digest = hashlib.sha256()
    for name, file in _model_files(path):
        digest.update(os.fsencode(name) + b"\0" + file_hash(file, keep).encode())
    return digest.hexdigest()[:12]


def file_hash(path: str, keep: bool = False) -> str:
    """The SHA-256 of a file's content, 64 hex digits: from the cache if the file is unchanged, else read.

    `keep`: cache the hash for later processes; a cache that can't be written is ignored. Raises OSError.
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
    """Name and path of each of a model's MODEL_FILES, sorted. Links are followed, but not in circles."""
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
    """The cache file for the hash of the file at `path`."""
    return KEPT / hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def _state(found: os.stat_result) -> str:
    """What identifies a file's state. Copying over a file can keep its size, mtime and inode, but not its ctime."""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _find(path: str, found: os.stat_result) -> str | None:
    """The cached hash of the file at `path`, if the cache entry is whole and belongs to this state of the file."""
    try:
        kept = _place(path).read_bytes()
    except OSError:
        return None
    match = re.fullmatch(_state(found).encode() + rb" ([0-9a-f]{64})", kept)
    return match[1].decode() if match else None
