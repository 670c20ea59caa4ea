"""Load a pipeline from a folder, a hub id or a checkpoint in one file; nothing is downloaded."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from concept_ablation.common.errors import UserError
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.remote_code import REFUSED, find_code

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

log = logging.getLogger(__name__)


# Up to this many latent positions a CPU computes attention as plain matrix products: a training step of 16
# took 23 % less at 256 positions (bf16). Larger ones weren't measured; there the products' memory grows with
# the square.
PLAIN_ATTENTION_POSITIONS = 1024


class ModelError(UserError):
    """A model that can't be loaded or used; the message says which and what to do."""


def load_pipeline(
    path: str | Path,
    revision: str | None = None,
    device: str = "auto",
    config: str | None = None,
    allow_custom_code: bool = False,
) -> StableDiffusionPipeline:
    """The pipeline at `path`, in fp32, on `device`, ready to sample.

    `path`: a folder, a hub id with `revision`, or a checkpoint in one file (.safetensors, .ckpt) as CompVis's code writes
    it. `config`, for one file alone: the folder of a diffusers pipeline of the same build, whose configs, tokenizer and
    scheduler serve, or the checkpoint's original .yaml; with the .yaml, or without any, those of the hub's default for
    such a checkpoint. Nothing is downloaded: what is of the hub must be in this machine's cache. There is no safety
    checker and no progress bar. A folder that brings Python code of its own is refused, unless `allow_custom_code`: then
    that code may run. Raises ModelError, DeviceError.
    """
    # Here, not at the top: it takes about three seconds, which scripts that load no pipeline needn't wait for.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    source = _check_source(str(path))
    for folder in (source, config):
        if folder and os.path.isdir(folder) and not allow_custom_code and (code := find_code(folder)):
            raise ModelError(f"{folder}: {REFUSED.format(code=code)}")
    place = pick_device(device)
    parts = {"dtype": torch.float32, "safety_checker": None, "requires_safety_checker": False}
    if os.path.isfile(source):
        pipeline = _load_single_file(source, config, parts)
    elif config is not None:
        raise ModelError(f"{path}: a config ({config}) is for a checkpoint in one file alone")
    else:
        pipeline = _load_folder(source, revision, parts | {"trust_remote_code": allow_custom_code})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(place)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval()
    if place.type == "cpu" and pipeline.unet.config.sample_size**2 <= PLAIN_ATTENTION_POSITIONS:
        from diffusers.models.attention_processor import AttnProcessor

        pipeline.unet.set_attn_processor(AttnProcessor())
    return pipeline


def _load_folder(path: str, revision: str | None, parts: Mapping) -> StableDiffusionPipeline:
    """The pipeline in a folder, or of a hub id that is in this machine's cache. Raises ModelError."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_pretrained(
            path, revision=revision, local_files_only=True, **parts
        )
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {why_refused(error)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        cure = "" if os.path.isdir(path) else f" (nothing is downloaded in a run: `hf download {path}` once)"
        raise ModelError(f"{path}: not a StableDiffusionPipeline that loads{cure}: {error}") from error


def _load_single_file(path: str, config: str | None, parts: Mapping) -> StableDiffusionPipeline:
    """The pipeline in one file; see `load_pipeline`. Raises ModelError."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import constants

    options = {}
    if config is not None and os.path.isdir(config):
        options["config"] = _check_source(config)
    elif config is not None and os.path.isfile(config):
        options["original_config"] = config
    elif config is not None:
        raise ModelError(f"{path}: its config {config} is neither a folder nor a file")
    if not path.endswith((".safetensors", ".ckpt")):
        raise ModelError(f"{path}: a checkpoint in one file ends in .safetensors or .ckpt")
    # diffusers asks the hub for a config that isn't there, even where told to use local files only, and says so.
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        pipeline = StableDiffusionPipeline.from_single_file(path, local_files_only=True, **options, **parts)
    except Exception as error:  # diffusers lets through whatever it meets: KeyError, RuntimeError, ...
        raise ModelError(f"{path}: {_why_no_checkpoint(error, 'config' in options)}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        diffusers_logging.set_verbosity(verbosity)
    return pipeline


def _why_no_checkpoint(error: BaseException, has_config: bool) -> str:
    """What was wrong with a checkpoint in one file, and the cure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, pickle.UnpicklingError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return why_refused(cause)
    what = f"not a checkpoint of a Stable Diffusion model that loads: {(str(error).strip() or repr(error)).splitlines()[0]}"
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
        if not os.path.isfile(os.path.join(path, "model_index.json")):
            raise ModelError(f"{path}: no model_index.json in this folder, so it is no diffusers pipeline")
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
