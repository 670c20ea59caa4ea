"""Stable Diffusion 3: a transformer of text and picture together, trained by flow matching, with up to three text encoders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from concept_ablation.diffusion.families.base import Conditioning
from concept_ablation.diffusion.flow_matching import MIXED, FlowFamily

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from torch import Tensor, nn

THIRD = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5. A folder without the third text encoder, T5, is loaded without it."""

    title = "Stable Diffusion 3"
    text_encoders: ClassVar = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    parked: ClassVar = THIRD[:1]
    groups: ClassVar = {
        "cross-attn": re.compile(r"\.attn\.add_[kv]_proj\.weight$"),  # a LoRA holds no biases
        "attn": re.compile(r"\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."),
        "full-weight": re.compile(""),
    }
    lacks: ClassVar = {
        "text-projections": f"{MIXED} (allowed: methods ablation and esd, training.preserve distill, how sum and ties)",
        "begin-of-text": f"{MIXED} (allowed: training.detach_bos false)",
        "one-vocabulary": "it has up to three (allowed: soft-prompt)",
    }

    def pipeline_class(self) -> type[StableDiffusion3Pipeline]:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            StableDiffusion3Pipeline,
        )

        return StableDiffusion3Pipeline

    def options(self, path: str) -> dict[str, Any]:
        absent = os.path.isdir(path) and not os.path.isdir(os.path.join(path, THIRD[0]))
        return dict.fromkeys(THIRD) if absent else {}

    def precisions(self, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
        import torch

        # T5 has more than twice the network's weights, and is published to be used in half precision.
        half = {THIRD[0]: torch.bfloat16} if device.type == "cuda" else {}
        return {**half, "default": torch.float32}

    def prepare(self, pipeline: StableDiffusion3Pipeline) -> None:
        # On a GPU attention is quickest without weights, and pictures have many more tokens than T5.
        if pipeline.text_encoder_3 is None and pipeline.device.type == "cpu":
            from concept_ablation.diffusion.absent_text import fold_absent

            fold_absent(pipeline.transformer)

    def encode_prompts(self, pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> Conditioning:
        # The same prompt for all encoders, one image each, and no encoding of the empty prompt for guidance.
        hidden, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, pipeline.device, 1, False)
        return Conditioning(hidden, pooled)

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return network(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning.hidden,
            pooled_projections=conditioning.pooled,
        ).sample


FAMILY = StableDiffusion3()
