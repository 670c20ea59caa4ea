"""Read deltas that other programs wrote: the reference's diffusers and CompVis files. docs/formats.md describes each form.

Of a pickled file only tensors are read: no code in it runs. `delta_export` writes these forms.
"""

from __future__ import annotations

import itertools
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
from concept_ablation.diffusion.compvis import TEXT_ENCODER, UNET
from concept_ablation.diffusion.delta import (
    METADATA_KEY,
    DeltaError,
    delta_parameters,
    load_delta,
    parse_token_row,
    save_delta,
    token_row_name,
)
from concept_ablation.diffusion.families.base import Family, family_of
from concept_ablation.diffusion.pipeline import load_pipeline, why_refused

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)
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
    trust_remote_code: bool = False,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors (fp32, named as in our deltas) and metadata of a delta in any form that we read.

    `model`, `revision`, `config`, `trust_remote_code`: the base model, as for `load_pipeline`. Of the text encoders only
    what differs from the model's is kept. Raises FormatError for a file that is no delta, would run code, or doesn't fit
    the model; DeltaError, ModelError, LayoutError.
    """
    pipeline = load_pipeline(str(model), revision, "cpu", config, trust_remote_code)
    found = _read(path, family_of(pipeline))
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
        trust_remote_code=model.get("trust_remote_code", False),
    )
    metadata |= {name: spec.get(name) for name in ("kind", "targets", "anchor", "stage", "version")}
    save_delta(delta, tensors, metadata)
    log.info("%s: %d tensors (%s) from %s", delta, len(tensors), metadata["group"], spec["file"])


@dataclass(frozen=True)
class _Found:
    """What a file held: its form, what names its tensors as in a delta, and its metadata if it is ours."""

    form: str
    names: Callable[[DiffusionPipeline], dict[str, Tensor]]
    metadata: Mapping[str, object]


def _read(path: str | Path, family: Family) -> _Found:
    """What the file at `path` holds, in whichever form it is. Raises FormatError, DeltaError."""
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
    if set(content) <= {family.network_name, *family.text_encoders}:
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
    """The tensors in a pickled file. Raises FormatError, with nothing run, if opening it would run code."""
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


def _from_compvis(state: Mapping, pipeline: DiffusionPipeline, path: str | Path) -> dict[str, Tensor]:
    """A CompVis delta's tensors, named as in ours where the model has them; else by their own names."""
    family = family_of(pipeline)
    parts = {family.network_name: family.network(pipeline)}
    if any(name.startswith(TEXT_ENCODER) for name in state):  # an OpenCLIP text encoder's have no such names
        parts |= family.encoders(pipeline)
    own = [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())
    ]
    ours = {theirs: name for name, theirs in family.compvis_names(pipeline, own).items()}
    named = {ours.get(name, name): value for name, value in state.items() if name != "embed"}
    if "embed" in state:
        ((name, encoder),) = _token_tables(pipeline, family).items()
        table = family.token_tables(pipeline)[encoder].weight
        named[name] = _whole_embedding(state["embed"], table.detach(), path)
    return named


def _token_tables(pipeline: DiffusionPipeline, family: Family) -> dict[str, str]:
    """The name of each token embedding's weight in a delta -> its text encoder."""
    tables = {id(table.weight): encoder for encoder, table in family.token_tables(pipeline).items()}
    return {
        f"{encoder}.{name}": encoder
        for encoder, module in family.encoders(pipeline).items()
        for name, value in module.named_parameters()
        if id(value) in tables
    }


def _whole_embedding(rows: object, whole: Tensor, path: str | Path) -> Tensor:
    """The token embedding `whole` with its last rows replaced by `rows`, as the reference loads them."""
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
def _fit(named: Mapping[str, object], pipeline: DiffusionPipeline, path: str | Path) -> dict[str, Tensor]:
    """The delta's tensors in fp32, each of its parameter's shape; of the text encoders what differs from the model's.

    Raises FormatError.
    """
    family = family_of(pipeline)
    named = {family.own_name(pipeline, name): value for name, value in named.items()}
    own = {
        name: value
        for name, value in delta_parameters(pipeline, named).items()
        if name.partition(".")[0] in (family.network_name, *family.text_encoders)
    }
    tables = _token_tables(pipeline, family)
    buffers = {
        f"{encoder}.{name}"
        for encoder, module in family.encoders(pipeline).items()
        for name, _ in module.named_buffers()
    }
    tensors, wrong = {}, []
    for name, value in named.items():
        if name in buffers:
            continue
        if name not in own or not isinstance(value, Tensor) or value.shape != own[name].shape:
            wrong.append(_misfit(name, value, own.get(name)))
        elif not value.is_floating_point() or not torch.isfinite(value).all():
            raise FormatError(f"{path}: {name} holds values that are no finite numbers")
        elif name.startswith(f"{family.network_name}.") or parse_token_row(name):
            tensors[name] = value.float()
        elif name in tables:
            changed = (value != own[name].to(value.dtype)).any(1).nonzero().flatten().tolist()
            tensors |= {token_row_name(tables[name], token): value[token].float() for token in changed}
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


def detect_group(tensors: Iterable[str], pipeline: DiffusionPipeline) -> str:
    """The smallest parameter group that holds `tensors`.

    Where a text encoder changed, "embedding" joins it, or "text-encoder" if more than token rows did.
    """
    family, names = family_of(pipeline), set(tensors)
    prefix = f"{family.network_name}."
    network = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    parts = []
    if network:
        whole = family.network(pipeline)
        parts = [
            group for group in family.groups if network <= set(family.trainable_parameters(whole, group))
        ][:1]
    text = {name for name in names if not name.startswith(prefix)}
    if text:
        parts.append("embedding" if all(parse_token_row(name) for name in text) else "text-encoder")
    return " + ".join(parts)


def _sha256(path: str | Path) -> str:
    try:
        return file_hash(str(path))
    except OSError as error:
        raise FormatError(f"{path}: can't be read: {error.strerror}") from None
