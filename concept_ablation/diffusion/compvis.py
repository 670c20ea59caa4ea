"""The names of a UNet's parameters in CompVis's code (`ldm`), given their names in diffusers.

They follow from the UNet's config, for any UNet of Stable Diffusion 1's build: blocks are counted as in `ldm`'s UNetModel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from concept_ablation.common.errors import UserError

UNET = "model.diffusion_model."
TEXT_ENCODER = "cond_stage_model.transformer.text_model."
# A layer of diffusers' residual block -> the layer of ldm's.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Block -> whether it has attention.
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MIDDLE = "UNetMidBlock2DCrossAttn"


class LayoutError(UserError):
    """A model whose parameters have no names in CompVis's layout; the message says which."""


def compvis_names(names: Iterable[str], config: Mapping) -> dict[str, str]:
    """CompVis's name (with `model.diffusion_model.`) of each of `names`, parameters of diffusers' UNet.

    `config`: the UNet's; its block types and `layers_per_block` are used. Raises LayoutError for blocks that Stable
    Diffusion 1 doesn't have.
    """
    blocks, found = dict(_blocks(config)), {}
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            raise LayoutError(f"the UNet's {name} has no place in CompVis's layout")
        inner = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            part, _, rest = inner.partition(".")
            inner = f"{RESNET[part]}.{rest}"
        found[name] = f"{UNET}{blocks[block]}.{inner}"
    return found


def _blocks(config: Mapping) -> Iterator[tuple[str, str]]:
    """Pairs of a block in diffusers and in `ldm`, in the order of computation."""
    down, up = config["down_block_types"], config["up_block_types"]
    for kinds, known in ((down, DOWN), (up, UP), ([config["mid_block_type"]], [MIDDLE])):
        if unknown := sorted(set(kinds) - set(known)):
            raise LayoutError(
                f"the UNet's {', '.join(unknown)} has no place in CompVis's layout (allowed: {', '.join(known)})"
            )
    yield from ENDS.items()
    layers = config["layers_per_block"]
    layers = [layers] * len(down) if isinstance(layers, int) else list(layers)
    number = 1
    for block, kind in enumerate(down):
        for layer in range(layers[block]):
            yield f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0"
            if DOWN[kind]:
                yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if block < len(down) - 1:
            yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for block, kind in enumerate(up):
        last = layers[len(up) - 1 - block]  # one layer more than the block on the way down
        for layer in range(last + 1):
            yield f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0"
            if UP[kind]:
                yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{number}.1"
            if layer == last and block < len(up) - 1:
                place = 2 if UP[kind] else 1
                yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"
            number += 1
