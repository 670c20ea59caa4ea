"""FLUX.1: a transformer of text and picture together, trained by flow matching, which takes guidance as an input.

Its first blocks, the double ones, have own layers for the text's tokens; in the others, the single ones, text and picture share all.
Latents go in packed: four neighboring cells are one token of the picture, which is told its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from concept_ablation.diffusion.families.base import Conditioning, ModelError
from concept_ablation.diffusion.flow_matching import MIXED, FlowFamily

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from torch import Tensor, nn

GUIDANCE = 3.5
"""What training tells a guidance-distilled network: the published sampler's value, since pictures are drawn so."""
DISTILLED = "guidance is an input of its network, which predicts once"


class Flux(FlowFamily):
    """FLUX.1-dev and, without guidance, FLUX.1-schnell."""

    title = "FLUX.1"
    tag = "flux"
    text_encoders: ClassVar = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    parked: ClassVar = ("text_encoder_2",)
    groups: ClassVar = {
        "cross-attn": re.compile(
            r"^transformer_blocks\.\d+\.attn\.add_[kv]_proj\.weight$"
        ),  # a LoRA holds no biases
        "single-attn": re.compile(r"^single_transformer_blocks\.\d+\.attn\.to_[kv]\.weight$"),
        "attn": re.compile(r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."),
        "full-weight": re.compile(""),
    }
    lacks: ClassVar = {
        "text-projections": f"{MIXED} (allowed: method ablation, training.preserve distill, how sum and ties)",
        "begin-of-text": f"{MIXED} (allowed: training.detach_bos false)",
        "guidance": f"{DISTILLED} (allowed: method ablation, anchors.negative_target false)",
        "one-vocabulary": "it has two (allowed: soft-prompt)",
    }

    def pipeline_class(self) -> type[FluxPipeline]:
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

        return FluxPipeline

    def precisions(self, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
        import torch

        # 12 and 4.7 billion weights, published in bf16. What is trained is held in fp32 all the same.
        half = dict.fromkeys((self.network_name, "text_encoder_2"), torch.bfloat16)
        return {**(half if device.type == "cuda" else {}), "default": torch.float32}

    def encode_prompts(self, pipeline: FluxPipeline, prompts: Sequence[str]) -> Conditioning:
        hidden, pooled, _ = pipeline.encode_prompt(list(prompts), None, pipeline.device)
        return Conditioning(hidden, pooled)

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        count, _, height, width = noisy.shape
        told = noisy.new_full((count,), GUIDANCE) if network.config.guidance_embeds else None
        found = network(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,  # the network multiplies it again
            guidance=told,
            encoder_hidden_states=conditioning.hidden,
            pooled_projections=conditioning.pooled,
            txt_ids=noisy.new_zeros(conditioning.hidden.shape[1], 3),
            img_ids=places(height // 2, width // 2).to(noisy),
        ).sample
        return unpacked(found, height, width)

    def sampling_options(self, sampler: Mapping[str, Any], negative: list[str] | None) -> dict[str, Any]:
        if negative:
            raise ModelError(f"{self.title} takes no negative prompt: {DISTILLED}")
        return {}


def packed(latents: Tensor) -> Tensor:
    """(n, cells / 4, 4 x channels) of latents (n, channels, height, width): each square of four cells is a token."""
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """(n, channels, height, width): what `packed` made tokens of."""
    count, _, size = tokens.shape
    squares = tokens.reshape(count, height // 2, width // 2, size // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(count, size // 4, height, width)


def places(rows: int, columns: int) -> Tensor:
    """(rows x columns, 3): zero, the row and the column of each token of the picture."""
    import torch

    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(len(grid), 1, dtype=grid.dtype), grid], dim=1)


FAMILY = Flux()
