"""The parameters that an ablation trains, by group, and what keeps their gradient from the first token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.pipeline import ModelError

ParameterGroup = Literal["cross-attn", "attn", "full-weight", "embedding"]


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
