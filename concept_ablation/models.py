"""Models: load a pipeline, name the parameters that an ablation trains, save and apply its result.

The result is a *delta*: a safetensors file of the trained parameters' new values (absolute, not differences;
fp32), named `<component>.<parameter>` as in the pipeline, with JSON metadata. So it loads into any pipeline
of the same shape. Of the text encoder's token embedding it holds rows, `text_encoder.token_embedding.<token>`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from concept_ablation.custom_code import REFUSED, find_code
from concept_ablation.runtime import atomic_output, damaged, pick_device

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

log = logging.getLogger(__name__)
ParameterGroup = Literal["cross-attn", "attn", "full-weight", "embedding"]
METADATA_KEY = "concept_ablation"
CHECKSUM = "values_sha256"  # another key of a delta's metadata
TOKEN_ROW = "text_encoder.token_embedding."  # and a token's id: the name of that row in a delta
# Up to this many latent positions a CPU computes attention as plain matrix products: a training step of 16
# took 23 % less at 256 positions (bf16). Larger ones weren't measured; there the products' memory grows with
# the square.
PLAIN_ATTENTION_POSITIONS = 1024


class ModelError(ValueError):
    """A model that can't be loaded or used; the message says which and what to do."""


class DeltaError(ValueError):
    """A delta file that is damaged or made for another model."""


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


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's cross-attention layers (diffusers' `attn2`), by name."""
    return {name: layer for name, layer in unet.named_modules() if name.rpartition(".")[2] == "attn2"}


@contextlib.contextmanager
def detach_bos(unet: nn.Module) -> Iterator[None]:
    """Inside, no gradient flows through the keys and values of the first token of any cross-attention layer.

    That token is the same for every prompt, so moving its keys and values would change what all prompts give
    (reference: its attention processors). Predictions are unchanged.
    """

    def detach_first(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return torch.cat((output[:, :1].detach(), output[:, 1:]), dim=1)

    layers = [part for layer in cross_attentions(unet).values() for part in (layer.to_k, layer.to_v)]
    hooks = [layer.register_forward_hook(detach_first) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trainable_parameters(unet: nn.Module, group: ParameterGroup) -> dict[str, nn.Parameter]:
    """The parameters of `group`, by name, in the UNet's order.

    `cross-attn`: keys and values of the cross-attention layers (the paper's choice for styles and objects);
    `attn`: queries, keys, values and output projections of all attention layers; `full-weight`: all;
    `embedding`: none, what it trains is in the text encoder (`tokens.TokenRows`). Raises ModelError for
    another group.
    """
    if group == "embedding":
        return {}
    if group not in get_args(ParameterGroup):
        raise ModelError(
            f"parameter group {group!r} is unknown (allowed: {', '.join(get_args(ParameterGroup))})"
        )
    parts = {
        "cross-attn": (".attn2.to_k.", ".attn2.to_v."),
        "attn": tuple(
            f".{layer}.{part}." for layer in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out")
        ),
        "full-weight": ("",),
    }[group]
    return {name: value for name, value in unet.named_parameters() if any(part in name for part in parts)}


def save_delta(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write `tensors` (named `<component>.<parameter>`) in fp32, and `metadata` (what JSON can hold).

    The file is there whole or not at all.
    """
    from safetensors.torch import save_file

    content = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    with atomic_output(path) as part:
        known = {METADATA_KEY: json.dumps(metadata, sort_keys=True), CHECKSUM: _checksum(content)}
        save_file(content, part, {"format": "pt", **known})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A delta's tensors (fp32, CPU) and its metadata. Raises DeltaError if it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
            metadata = json.loads(written[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError:
        raise DeltaError(f"{path}: no {METADATA_KEY!r} metadata, so it is no delta of this project") from None
    except FileNotFoundError:
        raise DeltaError(f"{path}: can't be read: there is no such file") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise damaged(DeltaError, path, f"can't be read ({error})") from error
    if written.get(CHECKSUM, now := _checksum(tensors)) != now:
        raise damaged(DeltaError, path, "its values aren't those that were written")
    return tensors, metadata


@torch.no_grad()
def apply_delta(pipeline: StableDiffusionPipeline, path: str | Path) -> dict[str, object]:
    """Put a delta's values into `pipeline`, in place, and return its metadata.

    Raises DeltaError, with the pipeline unchanged, if a parameter is missing or has another shape.
    """
    tensors, metadata = load_delta(path)
    own = {}
    for component in {name.partition(".")[0] for name in tensors}:
        module = getattr(pipeline, component, None)
        if isinstance(module, nn.Module):
            own |= {f"{component}.{name}": value for name, value in module.named_parameters()}
    if any(name.startswith(TOKEN_ROW) for name in tensors):
        rows = pipeline.text_encoder.get_input_embeddings().weight
        own |= {f"{TOKEN_ROW}{token}": row for token, row in enumerate(rows)}
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if wrong:
        raise DeltaError(
            f"{path}: {len(wrong)} of {len(tensors)} parameters don't fit this model, first {wrong[0]}; "
            f"the delta was made for {metadata.get('base_model', 'another model')!r}"
        )
    for name, value in tensors.items():
        own[name].copy_(value)
    return metadata
