"""Stable Diffusion 1 and 2: a UNet with cross-attention to one text encoder, which predicts noise or velocity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from concept_ablation.diffusion.compvis import TEXT_ENCODER, LayoutError, compvis_names
from concept_ablation.diffusion.families.base import Conditioning, Family, ModelError, NoiseSchedule

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from torch import Tensor, nn

# Up to this many latent positions a CPU computes attention as plain matrix products: a training step of 16 took 23 %
# less at 256 positions (bf16). Larger ones weren't measured; there the products' memory grows with the square.
PLAIN_ATTENTION_POSITIONS = 1024


class DiffusionSchedule(NoiseSchedule):
    """The noise of denoising diffusion: every training timestep is as likely as the others.

    `config`: that of the pipeline's own scheduler (noise levels, number of timesteps, prediction type).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers.schedulers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(config)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        import torch

        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ModelError(f"prediction type {kind!r} can't be trained (allowed: epsilon, v_prediction)")


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, and models of their build."""

    title = "Stable Diffusion 1 or 2"
    load_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}
    network_name = "unet"
    text_encoders: ClassVar = {"text_encoder": "tokenizer"}
    groups: ClassVar = {
        "cross-attn": re.compile(r"\.attn2\.to_[kv]\."),
        "attn": re.compile(r"\.attn[12]\.to_(q|k|v|out)\."),
        "full-weight": re.compile(""),
    }
    schedulers: ClassVar = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "euler": ("EulerDiscreteScheduler", {}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    }

    def pipeline_class(self) -> type[StableDiffusionPipeline]:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        return StableDiffusionPipeline

    def prepare(self, pipeline: StableDiffusionPipeline) -> None:
        if pipeline.device.type != "cpu":
            return
        import torch
        from diffusers.models.attention_processor import AttnProcessor

        # A picture is decoded in a sixth less time; the UNet would take a fifth more, since its normalisations are slow so.
        pipeline.vae.to(memory_format=torch.channels_last)
        if pipeline.unet.config.sample_size**2 <= PLAIN_ATTENTION_POSITIONS:
            pipeline.unet.set_attn_processor(AttnProcessor())

    def encode_prompts(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
        # One image a prompt, and no encoding of the empty prompt for guidance.
        return Conditioning(pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0])

    def latents(self, pipeline: StableDiffusionPipeline, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = (0.5 * log_variance.clamp(-30, 20)).exp()  # diffusers' bounds
        return (mean + deviation * noise.to(mean)) * pipeline.vae.config.scaling_factor

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return network(noisy, timesteps, conditioning.hidden).sample

    def noise_schedule(self, pipeline: StableDiffusionPipeline) -> NoiseSchedule:
        return DiffusionSchedule(pipeline.scheduler.config)

    def sampling_options(self, sampler: Mapping[str, Any], negative: list[str] | None) -> dict[str, Any]:
        return super().sampling_options(sampler, negative) | {"eta": sampler["eta"]}

    def text_projections(self, network: nn.Module) -> dict[str, nn.Module]:
        layers = {
            name: layer for name, layer in network.named_modules() if name.rpartition(".")[2] == "attn2"
        }
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in layers.items()
            for part in ("to_k", "to_v")
        }

    def own_name(self, pipeline: StableDiffusionPipeline, name: str) -> str:
        # transformers 5 has no `text_model` between the text encoder and its layers.
        if hasattr(pipeline.text_encoder, "text_model"):
            return name
        return name.replace("text_encoder.text_model.", "text_encoder.", 1)

    def kohya_names(self, pipeline: StableDiffusionPipeline, layers: Iterable[str]) -> dict[str, str]:
        return {name: f"lora_unet_{name.replace('.', '_')}" for name in layers}

    def compvis_names(self, pipeline: StableDiffusionPipeline, names: Iterable[str]) -> dict[str, str]:
        names = list(names)
        unet = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
        found = {f"unet.{ours}": theirs for ours, theirs in compvis_names(unet, pipeline.unet.config).items()}
        text = [name for name in names if name.startswith("text_encoder.")]
        if text and pipeline.text_encoder.config.hidden_act != "quick_gelu":
            raise LayoutError(
                f"{text[0]}: an OpenCLIP text encoder, as Stable Diffusion 2 has, joins queries, keys and values in CompVis's "
                "layout (allowed: changes of the unet)"
            )
        inner = {name: name.removeprefix("text_encoder.").removeprefix("text_model.") for name in text}
        return found | {name: TEXT_ENCODER + rest for name, rest in inner.items()}


FAMILY = StableDiffusion()
