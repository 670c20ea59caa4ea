"""Checkpoints: files from which a killed training goes on as if it had never stopped.

A checkpoint holds what `Training.state` gives, the records of the steps so far, and the fingerprint of the spec.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from concept_ablation.common.files import atomic_output

log = logging.getLogger(__name__)
# What reading a damaged file raises.
DAMAGE = (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError)
DAMAGE += (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
FORMAT = 1  # raise it when a checkpoint's content changes


def fingerprint(spec: Mapping) -> str:
    """A hash of a training's spec, by which a checkpoint is known to be of that training."""
    content = json.dumps([FORMAT, spec], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def save_checkpoint(path: str | Path, spec: Mapping, state: Mapping) -> None:
    """Write `state` (tensors, and what JSON can hold) for the training of `spec`: whole, or not at all.

    Raises OSError if the disk is full.
    """
    with atomic_output(path) as part, part.open("wb") as file:
        try:
            torch.save({"fingerprint": fingerprint(spec), "state": dict(state)}, file)
        except RuntimeError as error:  # torch tells of a wrong position, and hides why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | Path, spec: Mapping) -> dict | None:
    """The state at `path`, on the CPU. None, with a warning that says why, if the file can't serve for `spec`."""
    if not Path(path).exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load doesn't look at the checksums
        if damaged:
            raise ValueError(f"{damaged} has another checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, state = content["fingerprint"], content["state"]
    except DAMAGE as error:
        log.warning("%s: a damaged checkpoint, training starts afresh (%s)", path, str(error).split("\n")[0])
        return None
    if found != fingerprint(spec):
        log.warning("%s: a checkpoint of another training (other settings), training starts afresh", path)
        return None
    return state
