"""Approximate a change of weights by a LoRA: for each layer, a product of two small matrices.

By Eckart and Young (1936) the best rank-r approximation of a matrix, in Frobenius norm, keeps its r largest singular
values. A convolution's kernel is taken as the matrix (out, in x height x width), as every reader of LoRA files does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output
from concept_ablation.diffusion.delta import METADATA_KEY


class LoraError(UserError):
    """A change that no LoRA can hold, or a rank or an error bound that isn't one."""


@dataclass(frozen=True)
class Layer:
    """One layer's factors, fp32: `up` (out, rank[, 1, 1]) and `down` (rank, in[, height, width]).

    `error`: ||change - up down|| / ||change||, Frobenius norms, of the factors as they are written.
    """

    up: Tensor
    down: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """`network`: the component whose layers these are. `layers`: a layer there -> its factors.

    `left_out`: changed parameters that a LoRA can't hold. `error`: what the layers miss of the whole change, `left_out` among it, relative to its Frobenius norm;
    `left_out_share`: the norm of what was left out, relative to the same.
    """

    network: str
    layers: dict[str, Layer]
    left_out: list[str]
    error: float
    left_out_share: float

    def report(self) -> dict[str, object]:
        """Ranks and errors as the file's metadata holds them."""
        return {
            "layers": {
                name: {"rank": layer.rank, "error": layer.error} for name, layer in self.layers.items()
            },
            "max_layer_error": max(layer.error for layer in self.layers.values()),
            "error": self.error,
            "left_out": self.left_out,
            "left_out_share": self.left_out_share,
        }

    def summary(self) -> str:
        """The report in a sentence or two."""
        ranks = sorted(layer.rank for layer in self.layers.values())
        worst = max(self.layers, key=lambda name: self.layers[name].error)
        text = (
            f"{len(ranks)} layers of rank {ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]}); relative error "
            f"of the change {self.error:.2g}, at most {self.layers[worst].error:.2g} in a layer ({worst})"
        )
        if self.left_out:
            text += (
                f"; {len(self.left_out)} changed parameters that a LoRA can't hold (biases, norms, embeddings) are left "
                f"out, first {self.left_out[0]}: {self.left_out_share:.2g} of the change"
            )
        return text


def factorise(
    changes: Mapping[str, Tensor], network: str, *, rank: int | None = None, error: float | None = None
) -> Lora:
    """`changes` (parameter -> ablated minus base, named as in a delta) as a LoRA of the component `network`.

    Each layer gets `rank`, or the least rank whose error is at most `error` (0 to 1; give one of the two). Unchanged
    parameters need no factors. Raises LoraError.
    """
    if (rank is None) == (error is None):
        raise LoraError("give either a rank or an error bound")
    if rank is not None and rank < 1 or error is not None and not 0 < error < 1:
        raise LoraError(
            f"rank {rank}, error {error}: allowed are a rank from 1 and an error bound between 0 and 1"
        )
    layers, left_out, squares = {}, [], {}
    for name, change in changes.items():
        squares[name] = float(change.double().square().sum())
        if not squares[name]:
            continue
        if name.startswith(f"{network}.") and name.endswith(".weight") and change.ndim in (2, 4):
            layer = name.removeprefix(f"{network}.").removesuffix(".weight")
            layers[layer] = _factors(change, rank, error)
        else:
            left_out.append(name)
    if not layers:
        what = f"only {left_out[0]} and the like" if left_out else "nothing"
        raise LoraError(
            f"the delta changes {what}: a LoRA holds layers' weights of the {network}, nothing else"
        )
    total, left = sum(squares.values()), sum(squares[name] for name in left_out)
    missed = left + sum(
        layer.error**2 * squares[f"{network}.{name}.weight"] for name, layer in layers.items()
    )
    return Lora(network, layers, left_out, math.sqrt(missed / total), math.sqrt(left / total))


def _factors(change: Tensor, rank: int | None, error: float | None) -> Layer:
    """One layer's factors. The Gram matrix's eigenvectors, in fp64, are much quicker than an SVD and as exact here."""
    matrix = change.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if rank is None:
        # What is lost by keeping r singular values, for r = 0, 1, ...: the sums of the squares of the others.
        lost = torch.cat((values, values.new_zeros(1))).flip(0).cumsum(0).flip(0)
        rank = int((lost > error**2 * lost[0]).sum())
        while _truncate(change, matrix, values, vectors, rank, wide).error > error and rank < len(values):
            rank += 1  # rounding to fp32 can lift it over the bound
    return _truncate(change, matrix, values, vectors, min(rank, len(values)), wide)


def _truncate(
    change: Tensor, matrix: Tensor, values: Tensor, vectors: Tensor, rank: int, wide: bool
) -> Layer:
    kept = vectors[:, :rank]
    up, down = (kept, kept.T @ matrix) if wide else (matrix @ kept, kept.T)
    # Both factors get the square root of the singular value: neither is tiny where a reader rounds to fp16.
    root = values[:rank].clamp(min=values[0] * 1e-12).pow(0.25)
    up, down = (up * root, down / root[:, None]) if wide else (up / root, down * root[:, None])
    up, down = up.float().contiguous(), down.float().contiguous()
    error = float((matrix - up.double() @ down.double()).norm() / matrix.norm())
    tail = (1,) * (change.ndim - 2)
    return Layer(up.reshape(*up.shape, *tail), down.reshape(rank, *change.shape[1:]), error)


def save_diffusers(path: str | Path, lora: Lora, metadata: Mapping[str, object]) -> None:
    """Write the LoRA as diffusers' `load_lora_weights` reads it."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{lora.network}.{name}.lora_A.weight"] = layer.down
        tensors[f"{lora.network}.{name}.lora_B.weight"] = layer.up
    ranks = {name: layer.rank for name, layer in lora.layers.items()}
    first = next(iter(ranks.values()))
    # Some versions of diffusers take the first layer's rank for every layer's alpha; this tells them.
    config = {
        "r": first,
        "lora_alpha": first,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
    }
    named = {f"{lora.network}.{name}": value for name, value in config.items()}
    _save(path, tensors, metadata, {"lora_adapter_metadata": json.dumps(named)})


def save_kohya(
    path: str | Path, lora: Lora, metadata: Mapping[str, object], names: Mapping[str, str]
) -> None:
    """Write the LoRA with kohya's names, as A1111's web UI and ComfyUI read it. names: of each layer, see `Family.kohya_names`."""
    # Readers scale by alpha / rank. One alpha for all: diffusers mixes up an attention layer's own with the others'.
    alpha, tensors = max(layer.rank for layer in lora.layers.values()), {}
    for name, layer in lora.layers.items():
        flat = names[name]
        tensors[f"{flat}.lora_down.weight"] = layer.down
        tensors[f"{flat}.lora_up.weight"] = layer.up * (layer.rank / alpha)
        tensors[f"{flat}.alpha"] = torch.tensor(float(alpha))
    ranks = {layer.rank for layer in lora.layers.values()}
    dim = str(alpha) if len(ranks) == 1 else "Dynamic"
    own = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": str(alpha)}
    _save(path, tensors, metadata, own)


def _save(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object], own: Mapping[str, str]
) -> None:
    from safetensors.torch import save_file

    with atomic_output(path) as part:
        save_file(
            dict(tensors), part, {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True), **own}
        )
