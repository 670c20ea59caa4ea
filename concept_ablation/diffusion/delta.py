"""Deltas: files of the parameters that an ablation changed.

A delta is a safetensors file of the trained parameters' new values (absolute, not differences; fp32), named
`<component>.<parameter>` as in the pipeline, with JSON metadata. It loads into any pipeline of the same shape. Of a text
encoder's token embedding it holds single rows, `<text encoder>.token_embedding.<token id>`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output, damaged

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from safetensors import safe_open

log = logging.getLogger(__name__)
METADATA_KEY = "concept_ablation"
CHECKSUM = "values_sha256"  # another key of a delta's metadata
TOKEN_ROW = re.compile(r"(\w+)\.token_embedding\.(\d{1,9})", re.ASCII)  # a row's name: text encoder, token id


class DeltaError(UserError):
    """A delta file that is damaged or made for another model."""


def token_row_name(encoder: str, token: int) -> str:
    """The name in a delta of the row that token id `token` has in the token embedding of text encoder `encoder`."""
    return f"{encoder}.token_embedding.{token}"


def parse_token_row(name: str) -> tuple[str, int] | None:
    """The text encoder and the token id of a row's name in a delta; None for any other name."""
    found = TOKEN_ROW.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def delta_parameters(pipeline: DiffusionPipeline, names: Iterable[str]) -> dict[str, Tensor]:
    """Every parameter of the components that `names` are of, and the token rows among `names`, named as in a delta.

    The tensors are the pipeline's own. Names that the pipeline hasn't are left out.
    """
    names, own = list(names), {}
    for component in dict.fromkeys(name.partition(".")[0] for name in names):
        module = getattr(pipeline, component, None)
        if isinstance(module, nn.Module):
            own |= {f"{component}.{name}": value for name, value in module.named_parameters()}
    for name in names:
        encoder, token = parse_token_row(name) or (None, 0)
        rows = _token_table(pipeline, encoder) if encoder else ()
        if token < len(rows):
            own[name] = rows[token]
    return own


def _token_table(pipeline: DiffusionPipeline, encoder: str) -> Tensor | tuple[()]:
    """(vocabulary, width), the token embedding of a text encoder; nothing if there is no such encoder."""
    try:
        return getattr(pipeline, encoder).get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # no such component, or one that reads no tokens
        return ()


def save_delta(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write `tensors` (named `<component>.<parameter>`) in fp32, and `metadata` (what JSON can hold).

    The file is written whole or not at all.
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
        _add_to(digest, name, tensors[name])
    return digest.hexdigest()


def _add_to(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())


def load_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A delta's tensors (fp32, CPU) and its metadata. Raises DeltaError if it can't be read."""
    return dict(iterate_delta(path)), read_metadata(path)


def iterate_delta(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """A delta's tensors (fp32, CPU) by name, sorted, one by one: only what the caller keeps stays in memory.

    Raises DeltaError if it can't be read, and after the last tensor if the values aren't those that were written.
    """
    digest = hashlib.sha256()
    with _opened(path) as file:
        written = file.metadata() or {}
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            _add_to(digest, name, tensor)
            yield name, tensor
    if written.get(CHECKSUM, now := digest.hexdigest()) != now:
        raise damaged(DeltaError, path, "its values aren't those that were written")


def read_metadata(path: str | Path) -> dict[str, object]:
    """A delta's metadata. Raises DeltaError if it can't be read."""
    with _opened(path) as file:
        return json.loads(file.metadata()[METADATA_KEY])


def sampling_of(metadata: Mapping) -> dict[str, str]:
    """What a delta's pictures are drawn with beside its weights, as arguments of `sampler.sample_images`: nothing for most.

    A row that changes no weights may have a `negative_prompt`.
    """
    return dict(metadata.get("sampling", {}))


def delta_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a delta's tensors by name; no values are read. Raises DeltaError."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    """A delta's file. What goes wrong inside is told as a DeltaError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if METADATA_KEY not in (file.metadata() or {}):
                raise DeltaError(f"{path}: no {METADATA_KEY!r} metadata, so it is no delta of this project")
            yield file
    except FileNotFoundError:
        raise DeltaError(f"{path}: can't be read: there is no such file") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise damaged(DeltaError, path, f"can't be read ({error})") from error


@torch.no_grad()
def apply_delta(pipeline: DiffusionPipeline, path: str | Path) -> dict[str, object]:
    """Put a delta's values into `pipeline`, in place, and return its metadata.

    Any pipeline will do that has the delta's components in the same shapes. Warns of a delta whose pictures need more than its
    weights, see `sampling_of`. Raises DeltaError, with the pipeline unchanged, if a parameter is missing or has another shape.
    """
    tensors, metadata = load_delta(path)
    own = delta_parameters(pipeline, tensors)
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if wrong:
        raise DeltaError(
            f"{path}: {len(wrong)} of {len(tensors)} parameters don't fit this model, first {wrong[0]}; "
            f"the delta was made for {metadata.get('base_model', 'another model')!r}"
        )
    for name, value in tensors.items():
        own[name].copy_(value)
    if drawing := sampling_of(metadata):
        log.warning("%s: pictures of this row are to be drawn with %s", path, drawing)
    return metadata
