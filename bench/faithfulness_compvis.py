"""The CompVis half of bench/faithfulness.py: their `CustomDiffusion.training_step` beside our `Training`.

Their network is their own `UNetModel`, small and with random weights; ours is diffusers', with those weights
converted by diffusers' own function. Latents and text encodings are random tensors: their two encoders are
replaced by modules that pass them on.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from faithfulness_steps import SETTINGS, Difference, Half, Step, compare
from torch import Tensor, nn

CELLS, WIDTH, SCALE = 16, 32, 0.18215
PREFIX = "model.diffusion_model."
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = [
    ("cross-attn, model-based", False, False),
    ("... with masks", False, True),
    ("... with prior preservation", True, False),
    ("... with both", True, True),
]

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": CELLS,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 4,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": WIDTH,
        "use_checkpoint": False,
        "legacy": False,
    },
}


class PassLatents(nn.Module):
    """In place of their VAE: images are latents already."""

    def encode(self, latents: Tensor) -> Tensor:
        return latents


class LookUpText(nn.Module):
    """In place of their text encoder: an encoding drawn for each text."""

    texts: ClassVar[dict[str, Tensor]] = {}

    def encode(self, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            self.texts.setdefault(prompt, torch.randn(77, WIDTH))
        return torch.stack([self.texts[prompt] for prompt in prompts])


def stand_in_for_lightning() -> dict[str, ModuleType]:
    """The names that their files import from pytorch-lightning, as plain torch: nothing of it computes a loss."""

    class LightningModule(nn.Module):
        device, global_step = torch.device("cpu"), 0

        def log(self, *args, **kwargs) -> None: ...

        def log_dict(self, *args, **kwargs) -> None: ...

    parts = {name: ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities")}
    parts["pytorch_lightning.utilities.distributed"] = ModuleType("pytorch_lightning.utilities.distributed")
    parts["pytorch_lightning"].LightningModule = LightningModule
    for name in list(parts)[1:]:
        parts[name].rank_zero_only = lambda function: function
    return parts


def make_model(checkout: Path):
    """Their CustomDiffusion with Stable Diffusion's schedule, all weights drawn (many start as zeros)."""
    sys.path.insert(0, str(checkout / "compvis"))
    sys.modules.update(stand_in_for_lightning())
    torch.manual_seed(0)
    model = importlib.import_module("src.model").CustomDiffusion(
        freeze_model="crossattn-kv",
        loss_type_reverse="model-based",
        unet_config=UNET,
        first_stage_config={"target": f"{__name__}.PassLatents"},
        cond_stage_config={"target": f"{__name__}.LookUpText"},
        linear_start=SCHEDULE["beta_start"],
        linear_end=SCHEDULE["beta_end"],
        num_timesteps_cond=1,
        timesteps=1000,
        first_stage_key="image",
        cond_stage_key="caption",
        image_size=CELLS,
        channels=4,
        conditioning_key="crossattn",
        scale_factor=SCALE,
        use_ema=False,
    )
    with torch.no_grad():
        for value in model.model.diffusion_model.parameters():
            if value.dim() > 1:
                value.normal_(0, value[0].numel() ** -0.5)
    return model


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their network by diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {"layers_per_block": 1, "class_embed_type": None, "addition_embed_type": None}
    return convert_ldm_unet_checkpoint({f"{PREFIX}{name}": value for name, value in tensors.items()}, config)


class StableDiffusionPipeline(SimpleNamespace):
    """What our training asks of a pipeline. The class's name says of which family it is."""


def make_pipeline(weights: dict[str, Tensor]) -> StableDiffusionPipeline:
    """Diffusers' form of their network, in a pipeline without a VAE and a text encoder."""
    from diffusers.models import UNet2DConditionModel
    from diffusers.schedulers import DDPMScheduler

    unet = UNet2DConditionModel(
        sample_size=CELLS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    unet.load_state_dict(weights)
    scheduler, device = DDPMScheduler(**SCHEDULE), torch.device("cpu")
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    return StableDiffusionPipeline(
        unet=unet.eval(),
        text_encoder=nn.Module(),
        vae=vae,
        scheduler=scheduler,
        vae_scale_factor=8,
        device=device,
    )


def draw_batch(prompts: list[str], targets: list[str] | None, masked: bool) -> dict:
    """A batch as their data set makes it; `caption_target` names the anchor's prompts there."""
    mask = torch.ones(len(prompts), CELLS, CELLS)
    if masked:
        mask[:, :5], mask[:, :, 12:] = 0, 0
    batch = {"image": torch.randn(len(prompts), CELLS, CELLS, 4), "mask": mask, "caption": targets or prompts}
    return batch | ({"caption_target": prompts} if targets else {})


def take_step(model, optimizer: torch.optim.Optimizer, prior: bool, masked: bool) -> Step:
    """A step of their training on a batch drawn here; with `prior`, the prior's images come first in their list."""
    network, q_sample, drawn = model.model.diffusion_model, model.q_sample, []

    def record(x_start, t, noise=None):
        drawn.append((x_start, noise, t))
        return q_sample(x_start=x_start, t=t, noise=noise)

    anchors = ["a cat", "a red cat", "two cats", "cat"][: 2 if prior else 4]
    batches = [draw_batch(anchors, [f"pouting {prompt}" for prompt in anchors], masked)]
    if prior:
        batches.insert(0, draw_batch([f"very small {prompt}" for prompt in anchors], None, masked))
    before = weights_of(network)
    with mock.patch.object(model, "q_sample", record):
        loss = model.training_step(batches if prior else batches[0], 0)
    optimizer.zero_grad()
    loss.backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in network.named_parameters()
    }
    optimizer.step()
    halves = [
        Half(*draw, batch["caption"], batch.get("caption_target", batch["caption"]), batch["mask"][:, None])
        for draw, batch in zip(drawn, batches, strict=True)
    ]
    return Step(halves[-1], halves[0] if prior else None, before, loss.item(), by_our_names(gradients))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of their network's weights, by our names."""
    return by_our_names({name: value.detach().clone() for name, value in network.named_parameters()})


def by_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"unet.{name}": value for name, value in to_diffusers(tensors).items()}


def compvis_cases(checkout: Path, steps: int) -> Iterator[Difference]:
    """Every case of `CASES`; the prior is weighted 0.2."""
    model = make_model(checkout)
    network = model.model.diffusion_model
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    weights = to_diffusers(start)
    for name, prior, masked in CASES:
        network.load_state_dict(start)
        model.learning_rate = 1e-4
        optimizer = model.configure_optimizers()
        recorded = [take_step(model, optimizer, prior, masked) for _ in range(steps)]
        settings = dataclasses.replace(
            SETTINGS,
            steps=steps,
            learning_rate=1e-4,
            scale_lr="none",
            prior_preservation=prior,
            prior_form="halved",
            prior_weight=0.2,
            max_grad_norm=None,
        )
        case, final = f"CompVis: {name}", weights_of(network)
        yield compare(case, lambda: make_pipeline(weights), settings, recorded, final, LookUpText.texts)
