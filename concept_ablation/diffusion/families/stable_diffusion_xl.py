"""Stable Diffusion XL: the UNet of Stable Diffusion with two text encoders, a pooled encoding, and sizes as an input.

The network is told the side of the picture before it was enlarged, and where it was cut (Podell et al. 2024, section 2.2). Its VAE
leaves fp16's range, so pixels are encoded and decoded in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.diffusion.compvis import UNET, LayoutError, compvis_names
from concept_ablation.diffusion.families.base import Conditioning, Frame
from concept_ablation.diffusion.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from torch import Tensor, nn


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL 1.0, and models of its build. Its refiner, which has one text encoder, isn't one."""

    title = "Stable Diffusion XL"
    load_options: ClassVar = {"add_watermarker": False}
    text_encoders: ClassVar = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    lacks: ClassVar = {
        "one-vocabulary": "it has two, and words of one needn't be the other's (allowed: soft-prompt)"
    }

    def pipeline_class(self) -> type[StableDiffusionXLPipeline]:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        return StableDiffusionXLPipeline

    def encode_prompts(self, pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> Conditioning:
        # One image a prompt, and no encoding of the empty prompt for guidance. The pictures are whole, of the model's own size.
        hidden, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, pipeline.device, 1, False)
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        return self.framed(Conditioning(hidden, pooled), [(side, 0, 0)] * len(prompts))

    def unconditional(self, pipeline: StableDiffusionXLPipeline) -> Conditioning:
        empty = super().unconditional(pipeline)
        if not pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return replace(
            empty,
            hidden=empty.hidden.new_zeros(empty.hidden.shape),
            pooled=empty.pooled.new_zeros(empty.pooled.shape),
        )

    def framed(self, conditioning: Conditioning, frames: Sequence[Frame]) -> Conditioning:
        # The side before it was enlarged, where it was cut, and the side that it has.
        numbers = [(side, side, top, left, side, side) for side, top, left in frames]
        return replace(conditioning, time_ids=conditioning.hidden.new_tensor(numbers))

    def encode_pixels(self, pipeline: StableDiffusionXLPipeline, pixels: Tensor) -> Tensor:
        import torch

        with torch.autocast(pixels.device.type, enabled=False):
            return super().encode_pixels(pipeline, pixels.float())

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        told = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return network(noisy, timesteps, conditioning.hidden, added_cond_kwargs=told).sample

    def own_name(self, pipeline: StableDiffusionXLPipeline, name: str) -> str:
        for encoder, module in self.encoders(pipeline).items():
            if not hasattr(module, "text_model"):
                name = name.replace(f"{encoder}.text_model.", f"{encoder}.", 1)
        return name

    def kohya_names(self, pipeline: StableDiffusionXLPipeline, layers: Iterable[str]) -> dict[str, str]:
        # kohya's scripts keep the names of the original code here, other than for Stable Diffusion 1.
        names = compvis_names(layers, pipeline.unet.config)
        return {
            ours: f"lora_unet_{theirs.removeprefix(UNET).replace('.', '_')}" for ours, theirs in names.items()
        }

    def compvis_names(self, pipeline: StableDiffusionXLPipeline, names: Iterable[str]) -> dict[str, str]:
        names = list(names)
        if text := [name for name in names if not name.startswith("unet.")]:
            raise LayoutError(
                f"{text[0]}: a delta in CompVis's layout has one text encoder (allowed: changes of the unet)"
            )
        return super().compvis_names(pipeline, names)


FAMILY = StableDiffusionXL()
