"""How specs name models and files: by path, revision and a hash of the content. Nothing here imports torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from concept_ablation.common.hashes import file_hash, fingerprint
from concept_ablation.plan.graph import PlanError


def model_spec(model: Mapping, key: str) -> dict:
    """A model's part of a spec: a folder or file with its fingerprint, or a hub id with its pinned revision.

    `key`: the model's key in the config, for messages. Raises PlanError.
    """
    path, revision = model["path"], model.get("revision")
    spec = {"path": path, "revision": revision, "trust_remote_code": bool(model.get("trust_remote_code"))}
    if model.get("config"):
        spec["config"] = model["config"]
        if os.path.exists(model["config"]):
            spec["config_fingerprint"] = fingerprint_of(model["config"], key)
    if os.path.exists(path):
        return {**spec, "fingerprint": fingerprint_of(path, key)}
    if revision is None:
        raise PlanError(
            f"{key}: there is no folder or file {path!r} here. Give the folder of a model or a single-file checkpoint; a "
            "hub id needs its pinned revision (for the scorer: an open_clip name and its pretrained weights)"
        )
    return spec


@functools.cache
def fingerprint_of(path: str, key: str) -> str:
    """The fingerprint of a model, computed once per plan, since rows share it. Raises PlanError."""
    try:
        return fingerprint(path, keep=True)
    except OSError as error:
        raise PlanError(f"{key}: {error.filename}: can't be read: {error.strerror}") from None


def clip_spec(scorer: Mapping, key: str) -> dict:
    """A CLIP model's part of a spec: a folder or file with its fingerprint, or the name of published weights."""
    model, weights = scorer["model"], scorer["pretrained"]
    if weights is None or os.path.isdir(model):
        return {**scorer, "fingerprint": model_spec({"path": model}, f"{key}.model")["fingerprint"]}
    if os.path.isfile(weights):
        return {**scorer, "fingerprint": fingerprint_of(weights, f"{key}.pretrained")}
    return dict(scorer)


def sha256_of(path: str, column: str) -> str:
    """SHA-256 of a file that a row names. Raises PlanError."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a device or a pipe would never end
        raise PlanError(f"column {column!r}: {path}: can't be read: it is not a regular file")
    try:
        return file_hash(path, keep=True)
    except OSError as error:
        raise PlanError(f"column {column!r}: {path}: can't be read: {error.strerror}") from None
