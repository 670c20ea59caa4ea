"""Load a pipeline from a folder, a hub id or a checkpoint in one file; nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from concept_ablation.common.hardware import pick_device
from concept_ablation.common.parts import timed
from concept_ablation.common.remote_code import REFUSED, find_code
from concept_ablation.diffusion.families.base import Family, ModelError, family_named
from concept_ablation.diffusion.parking import place
from concept_ablation.registries import FAMILIES

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

INDEX = "model_index.json"  # of a pipeline's folder; it names the pipeline's class


@timed("loading")
def load_pipeline(
    path: str | Path,
    revision: str | None = None,
    device: str = "auto",
    config: str | None = None,
    trust_remote_code: bool = False,
) -> DiffusionPipeline:
    """The pipeline at `path`, in fp32, on `device`, ready to sample. Its class is that of its family.

    `path`: a folder, a hub id with `revision`, or a checkpoint in one file (.safetensors, .ckpt) as CompVis's code writes
    it. `config`, for one file alone: the folder of a diffusers pipeline of the same build, whose configs, tokenizer and
    scheduler serve, or the checkpoint's original .yaml; with the .yaml, or without any, those of the hub's default for
    such a checkpoint. Nothing is downloaded: what is of the hub must be in this machine's cache. There is no safety
    checker and no progress bar. A folder that brings Python code of its own is refused, unless `trust_remote_code`: then
    that code may run. Raises ModelError, DeviceError.
    """
    _hide_progress_bars()
    source = _check_source(str(path))
    if not trust_remote_code:
        for folder in (source, config):
            _refuse_code(folder)
    found = pick_device(device)
    if os.path.isfile(source):
        family, pipeline = _load_single_file(source, config)
    elif config is not None:
        raise ModelError(f"{path}: a config ({config}) is for a checkpoint in one file alone")
    else:
        family, pipeline = _load_folder(source, revision, trust_remote_code, found)
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, found)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    family.prepare(pipeline)
    return pipeline


def _hide_progress_bars() -> None:
    # Imported here, not at the top: it takes about three seconds, which scripts that load no pipeline needn't wait for.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()


def _refuse_code(folder: str | None) -> None:
    """Raise ModelError if a model's folder brings Python code."""
    if folder and os.path.isdir(folder) and (code := find_code(folder)):
        raise ModelError(f"{folder}: {REFUSED.format(code=code)}")


def _load_folder(
    path: str, revision: str | None, trust_remote_code: bool, device: torch.device
) -> tuple[Family, DiffusionPipeline]:
    """The pipeline in a folder, or of a hub id that is in this machine's cache. Raises ModelError."""
    family = _family_of_folder(path, revision)
    kind = family.pipeline_class()
    try:
        pipeline = kind.from_pretrained(
            path,
            revision=revision,
            local_files_only=True,
            dtype=family.precisions(device),
            trust_remote_code=trust_remote_code,
            **family.options(path),
        )
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {why_refused(error)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a {kind.__name__} that loads{_cure(path)}: {error}") from error
    return family, pipeline


def _family_of_folder(path: str, revision: str | None) -> Family:
    """The family of the pipeline whose class a folder's, or a hub id's, `model_index.json` names. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    try:
        file = os.path.join(path, INDEX)
        if not os.path.isdir(path):
            file = hf_hub_download(path, INDEX, revision=revision, local_files_only=True)
        index = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a diffusers pipeline that loads{_cure(path)}: {error}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(name, list) and name:  # a class in the model's own code: its module, its name
        name = name[-1]
    try:
        return family_named(str(name))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _cure(path: str) -> str:
    return "" if os.path.isdir(path) else f" (nothing is downloaded in a run: `hf download {path}` once)"


def _load_single_file(path: str, config: str | None) -> tuple[Family, DiffusionPipeline]:
    """The pipeline in one file; see `load_pipeline`. Raises ModelError.

    Such a file doesn't name its pipeline's class. A config's folder does; without one it is the registry's first.
    """
    options = {}
    if config is not None and os.path.isdir(config):
        options["config"] = _check_source(config)
    elif config is not None and os.path.isfile(config):
        options["original_config"] = config
    elif config is not None:
        raise ModelError(f"{path}: its config {config} is neither a folder nor a file")
    if not path.endswith((".safetensors", ".ckpt")):
        raise ModelError(f"{path}: a checkpoint in one file ends in .safetensors or .ckpt")
    family = _family_of_folder(config, None) if "config" in options else FAMILIES[next(iter(FAMILIES))]
    options |= family.load_options
    try:
        with _offline():
            pipeline = family.pipeline_class().from_single_file(
                path, local_files_only=True, dtype=torch.float32, **options
            )
    except Exception as error:  # diffusers lets through whatever it meets: KeyError, RuntimeError, ...
        raise ModelError(f"{path}: {_why_no_checkpoint(error, family, 'config' in options)}") from error
    return family, pipeline


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside, diffusers asks the hub for nothing and doesn't say that it would have.

    Otherwise it asks for a config that isn't there, even where it is told to use local files only.
    """
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import constants

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        diffusers_logging.set_verbosity(verbosity)


def _why_no_checkpoint(error: BaseException, family: Family, has_config: bool) -> str:
    """What was wrong with a checkpoint in one file, and the cure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, pickle.UnpicklingError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return why_refused(cause)
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    what = f"not a checkpoint of {family.title} that loads: {first_line}"
    if isinstance(error, NotImplementedError):  # torch's, of a tensor that is there in name only
        what = "some of the model's weights are missing"
    if has_config:
        return what
    return (
        f"{what}. Nothing is downloaded in a run: give as its config (model.config) the folder of a diffusers pipeline of "
        "the same build"
    )


def why_refused(error: BaseException) -> str:
    """Why torch, told to read tensors alone, didn't read a pickled file; nothing in it was run."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code is None:
        return "refused, nothing in it was run: it is damaged or holds more than tensors"
    return (
        f"refused, nothing in it was run: opening it would call {code[1]}, where only tensors are allowed. Get it as "
        ".safetensors"
    )


def _check_source(path: str) -> str:
    """`path` if it is a model folder, a file, or may be a hub id. Raises ModelError."""
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, INDEX)):
            raise ModelError(f"{path}: no {INDEX} in this folder, so it is no diffusers pipeline")
        return path
    owner, _, name = path.partition("/")
    if (
        not name
        or "/" in name
        or owner in ("", ".", "..", "~")
        or os.path.exists(owner)
        or os.path.exists(path)
    ):
        raise ModelError(
            f"{path}: there is no such folder or file; give the folder of a diffusers pipeline, a checkpoint in one file, or "
            "a hub id"
        )
    return path
