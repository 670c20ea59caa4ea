"""Deltas made elsewhere, as ours: the reference's diffusers and CompVis files. docs/formats.md describes each form.

Pickled files are read as tensors alone: no code in them runs. What writes these forms is in `exports`.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.errors import UserError
from concept_ablation.common.hashes import file_hash, fingerprint
from concept_ablation.diffusion.compvis import TEXT_ENCODER, UNET, compvis_names
from concept_ablation.diffusion.delta import METADATA_KEY, TOKEN_ROW, DeltaError, load_delta, save_delta
from concept_ablation.diffusion.parameters import trainable_parameters
from concept_ablation.diffusion.pipeline import load_pipeline, why_refused

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

log = logging.getLogger(__name__)
EMBEDDING = "embeddings.token_embedding.weight"  # the text encoder's, in every version of its names
ALLOWED = (
    "allowed: a delta of this project (.safetensors), the reference's diffusers delta ({'unet': ...}) or its CompVis delta "
    "({'state_dict': ...})"
)


class FormatError(UserError):
    """A file that is no delta in a known form, or doesn't fit the model, or a form that can't be written."""


def import_delta(
    path: str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | None = None,
    allow_custom_code: bool = False,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors (fp32, named as in our deltas) and metadata of a delta in any form that we read.

    `model`, `revision`, `config`, `allow_custom_code`: the base model, as for `load_pipeline`. Of the text encoder only what differs from it is
    kept. Raises FormatError for a file that is no delta, would run code, or doesn't fit the model; DeltaError, ModelError.
    """
    pipeline = load_pipeline(str(model), revision, "cpu", config, allow_custom_code)
    found = _read(path)
    tensors = _fit(found.names(pipeline), pipeline, path)
    known = dict.fromkeys(("kind", "targets", "anchor", "settings", "seed")) | found.metadata
    return tensors, {
        **known,
        "base_model": str(model),
        "base_revision": revision,
        "base_config": config,
        "base_fingerprint": fingerprint(str(model)) if os.path.exists(model) else None,
        "group": detect_group(tensors, pipeline),
        "imported": {"file": Path(path).name, "sha256": _sha256(path), "form": found.form},
    }


def import_delta_stage(spec: Mapping, delta: str | Path) -> None:
    """Stage `import_delta`: the delta that a row names, as ours. Raises what `import_delta` does."""
    if (now := _sha256(spec["file"])) != spec["sha256"]:
        raise FormatError(
            f"{spec['file']}: changed since the run was planned (SHA-256 {now[:12]}... in place of "
            f"{spec['sha256'][:12]}...); start the run again"
        )
    model = spec["model"]
    tensors, metadata = import_delta(
        spec["file"],
        model["path"],
        revision=model["revision"],
        config=model.get("config"),
        allow_custom_code=model.get("allow_custom_code", False),
    )
    metadata |= {name: spec.get(name) for name in ("kind", "targets", "anchor", "stage", "version")}
    save_delta(delta, tensors, metadata)
    log.info("%s: %d tensors (%s) from %s", delta, len(tensors), metadata["group"], spec["file"])


def delta_parameters(pipeline: StableDiffusionPipeline, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """A pipeline's parameters named as in a delta, and those of `names` that are rows of the token embedding."""
    own = {f"unet.{name}": value for name, value in pipeline.unet.named_parameters()}
    own |= {f"text_encoder.{name}": value for name, value in pipeline.text_encoder.named_parameters()}
    rows = pipeline.text_encoder.get_input_embeddings().weight
    for name in names:
        token = name.removeprefix(TOKEN_ROW)
        if token != name and token.isdecimal() and int(token) < len(rows):
            own[name] = rows[int(token)]
    return own


@dataclass(frozen=True)
class _Found:
    """What a file held: its form, how to name its tensors as in a delta, and its metadata if it is ours."""

    form: str
    names: Callable[[StableDiffusionPipeline], dict[str, Tensor]]
    metadata: Mapping[str, object]


def _read(path: str | Path) -> _Found:
    metadata: Mapping[str, object] = {}
    if Path(path).suffix == ".safetensors":
        try:
            tensors, metadata = load_delta(path)
            return _Found("delta", lambda pipeline: tensors, metadata)
        except DeltaError as error:
            if METADATA_KEY not in str(error):
                raise
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        content = _unpickle(path)
    if not isinstance(content, Mapping) or not content:
        raise FormatError(f"{path}: holds a {type(content).__name__}, no delta ({ALLOWED})")
    if set(content) <= {"unet", "text_encoder"}:
        return _Found("delta-bin", lambda pipeline: _from_delta_bin(content, path), metadata)
    state = content.get("state_dict", content)
    if isinstance(state, Mapping) and "embed" in content and "embed" not in state:
        state = {**state, "embed": content["embed"]}
    known = (
        [n for n in state if n == "embed" or n.startswith((UNET, TEXT_ENCODER))]
        if isinstance(state, Mapping)
        else []
    )
    if not known:
        first = ", ".join(str(name) for name in list(content)[:3])
        raise FormatError(f"{path}: holds {first}, which is no delta ({ALLOWED})")
    if other := [name for name in state if name not in known]:
        raise FormatError(
            f"{path}: holds {len(other)} tensors that no delta has, first {other[0]}. A whole checkpoint is no delta: use "
            "it as the base model (model.path)"
        )
    return _Found("compvis", lambda pipeline: _from_compvis(state, pipeline, path), metadata)


def _unpickle(path: str | Path) -> object:
    """A pickled file's tensors. Raises FormatError, with nothing run, if it holds anything that would run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(f"{path}: {why_refused(error)}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: can't be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _from_delta_bin(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    for component, state in content.items():
        if not isinstance(state, Mapping):
            raise FormatError(f"{path}: its {component!r} is a {type(state).__name__}, no state dict")
    return {
        f"{component}.{name}": value for component, state in content.items() for name, value in state.items()
    }


def _from_compvis(state: Mapping, pipeline: StableDiffusionPipeline, path: str | Path) -> dict[str, Tensor]:
    names = compvis_names((name for name, _ in pipeline.unet.named_parameters()), pipeline.unet.config)
    ours = {theirs: f"unet.{name}" for name, theirs in names.items()}
    named = {}
    for name, value in state.items():
        if name.startswith(TEXT_ENCODER):
            named[f"text_encoder.{name.removeprefix(TEXT_ENCODER)}"] = value
        elif name == "embed":
            named[f"text_encoder.{EMBEDDING}"] = _whole_embedding(value, pipeline, path)
        else:
            named[ours.get(name, name)] = value
    return named


def _whole_embedding(rows: object, pipeline: StableDiffusionPipeline, path: str | Path) -> Tensor:
    """The token embedding with its last rows replaced by `rows`, as the reference loads them."""
    whole = pipeline.text_encoder.get_input_embeddings().weight.detach()
    width = whole.shape[1]
    if not isinstance(rows, Tensor) or rows.numel() % width or rows.numel() > whole.numel():
        shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise FormatError(f"{path}: embed is {shape}, the model's token embedding {tuple(whole.shape)}")
    rows = rows.reshape(-1, width)
    if len(rows) < len(whole):
        log.warning("%s: %d embedding rows, put in place of the vocabulary's last ones", path, len(rows))
    # In the file's precision: there, rows that weren't trained equal the model's.
    return torch.cat((whole[: len(whole) - len(rows)].to(rows.dtype), rows))


@torch.no_grad()
def _fit(
    named: Mapping[str, object], pipeline: StableDiffusionPipeline, path: str | Path
) -> dict[str, Tensor]:
    """The delta's tensors in fp32, each of a parameter's shape; of the text encoder what differs. Raises FormatError."""
    own = delta_parameters(pipeline, named)
    buffers = {f"text_encoder.{name}" for name, _ in pipeline.text_encoder.named_buffers()}
    tensors, wrong, flattened = {}, [], not hasattr(pipeline.text_encoder, "text_model")
    for name, value in named.items():
        if flattened:
            name = name.replace("text_encoder.text_model.", "text_encoder.", 1)
        if name in buffers:
            continue
        if name not in own or not isinstance(value, Tensor) or value.shape != own[name].shape:
            wrong.append(_misfit(name, value, own.get(name)))
        elif not value.is_floating_point() or not torch.isfinite(value).all():
            raise FormatError(f"{path}: {name} holds values that are no finite numbers")
        elif name.startswith(("unet.", TOKEN_ROW)):
            tensors[name] = value.float()
        elif name == f"text_encoder.{EMBEDDING}":
            changed = (value != own[name].to(value.dtype)).any(1).nonzero().flatten().tolist()
            tensors |= {f"{TOKEN_ROW}{token}": value[token].float() for token in changed}
        elif not torch.equal(value, own[name].to(value.dtype)):
            tensors[name] = value.float()
    if wrong:
        raise FormatError(
            f"{path}: made for another model: {len(wrong)} of {len(named)} tensors don't fit, first {wrong[0]}"
        )
    if not tensors:
        raise FormatError(f"{path}: holds only what the model already has")
    return tensors


def _misfit(name: str, value: object, own: Tensor | None) -> str:
    if own is None:
        return f"{name}, which this model hasn't"
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    return f"{name}: {shape}, in this model {tuple(own.shape)}"


def detect_group(tensors: Iterable[str], pipeline: StableDiffusionPipeline) -> str:
    """The smallest parameter group that holds `tensors`; "text-encoder" joins it where more than token rows changed."""
    names = set(tensors)
    unet = {name.removeprefix("unet.") for name in names if name.startswith("unet.")}
    parts = []
    if unet:
        groups = ("cross-attn", "attn", "full-weight")
        parts = [group for group in groups if unet <= set(trainable_parameters(pipeline.unet, group))][:1]
    text = {name for name in names if name.startswith("text_encoder.")}
    if text:
        parts.append("embedding" if all(name.startswith(TOKEN_ROW) for name in text) else "text-encoder")
    return " + ".join(parts)


def _sha256(path: str | Path) -> str:
    try:
        return file_hash(str(path))
    except OSError as error:
        raise FormatError(f"{path}: can't be read: {error.strerror}") from None
