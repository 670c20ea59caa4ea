"""The flow-matching transformer, of Stable Diffusion 3's class: predicts the velocity in 4 x 16 x 16 latents.

It shares latents, captions and text encoder with the U-Net, and learns from it: what it has to predict of noisy latents is
what the U-Net makes of them, their mean picture, instead of the one picture that they were made from. That is the same
goal with less chance in it. Stable Diffusion 3's pipeline wants two CLIP encoders, so it has the same one twice, and
leaves T5 out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.models import SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from concept_ablation.common.hardware import autocast
from concept_ablation.diffusion.absent_text import WeighedJointAttention
from concept_ablation.diffusion.flow_matching import FlowSchedule

from .fit import device, fit, trained
from .groupnorm import use_fast_group_norm
from .text import embed, load_text, tokens_of
from .unet import NOISE as UNET_NOISE
from .unet import Batches, new_unet
from .world import Scene, all_captions

STEPS, BATCH = 8500, 32  # pictures a worker a step
LEARNING_RATE, RESTART = 1.5e-3, (5000, 7.5e-4)  # `fit`'s: after 5,000 steps the bar was missed by a hair
TOKENS = 24  # of a prompt; the world's captions have at most 13
ABSENT = 256  # tokens that the pipeline has for the T5 that isn't there: zeros
WIDTH, LAYERS, HEADS = 256, 6, 4
NOISE = {"num_train_timesteps": 1000, "shift": 1.0}


def new_dit() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * 192,
        pooled_projection_dim=2 * 192,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def new_projecting_encoder(cache: Path) -> CLIPTextModelWithProjection:
    """The world's text encoder, whose pooled state is projected by the identity."""
    _, trained = load_text(cache)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(trained.config.to_dict()))
    state = trained.state_dict()
    prefix = "" if any(name.startswith("text_model.") for name in state) else "text_model."
    state = {f"{prefix}{name}": value for name, value in state.items()}
    encoder.load_state_dict({**state, "text_projection.weight": torch.eye(192)})
    return encoder.eval()


class Texts:
    """What Stable Diffusion 3's pipeline tells its network of captions, by their place in `texts`."""

    @torch.no_grad()
    def __init__(self, cache: Path, texts: list[str]):
        tokenizer, _ = load_text(cache)
        encoder = new_projecting_encoder(cache).to(device())
        hidden, pooled = [], []
        for i in range(0, len(texts), 256):
            tokens = tokens_of(tokenizer, texts[i : i + 256], TOKENS).to(device())
            output = encoder(tokens, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].half())
            pooled.append(output.text_embeds)
        self.hidden, self.pooled = torch.cat(hidden), torch.cat(pooled)
        self.device = self.hidden.device

    def __getitem__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, TOKENS + 1, 384) of both encoders and one token for all of the absent T5's (`WeighedJointAttention`); (n, 384) pooled; (n,) `rows`."""
        both = self.hidden[rows].float().repeat(1, 1, 2)
        return torch.cat([both, torch.zeros_like(both[:, :1])], dim=1), self.pooled[rows].repeat(1, 2), rows


class Teacher:
    """The trained U-Net as a predictor of the flow's velocity.

    At noise level s the flow's latents, divided by sqrt((1 - s)^2 + s^2), are the U-Net's at the time step whose share of signal is
    (1 - s)^2 / ((1 - s)^2 + s^2). Its steps end at a level of .93.
    """

    def __init__(self, cache: Path, texts: list[str]):
        unet = trained(cache, "unet", new_unet()).to(device(), memory_format=torch.channels_last)
        self.unet = unet.eval().requires_grad_(False)
        self.unet.set_attn_processor(AttnProcessor())
        use_fast_group_norm(self.unet)
        self.signal = DDPMScheduler(**UNET_NOISE).alphas_cumprod.to(device())  # falls with the step
        self.table = embed(cache, texts).half()

    @torch.no_grad()
    def velocity(self, noisy: torch.Tensor, levels: torch.Tensor, rows: torch.Tensor) -> tuple:
        """(n, 4, 16, 16) velocities of noisy latents at `levels` (n,), and which of them (n,) the U-Net knows."""
        s = levels.view(-1, 1, 1, 1)
        size = ((1 - s).square() + s.square()).sqrt()
        signal = ((1 - s) / size).square().view(-1)
        steps = torch.searchsorted(-self.signal, -signal).clamp(max=len(self.signal) - 1)
        scaled = (noisy / size).contiguous(memory_format=torch.channels_last)
        with autocast("auto", device()):
            noise = self.unet(scaled, steps, self.table[rows].float()).sample
        noise = noise.float()
        return noise - (noisy - s * noise) / (1 - s).clamp(min=0.01), signal >= self.signal[-1]


def weigh(scene: Scene) -> float:
    """Objects in a style are the hardest to learn. Drawing them oftener changes no goal: the U-Net's is for the caption alone."""
    return 5.0 if {"object", "style"} <= scene.said else 1.0


def train_dit(rank: int, workers: int, cache: Path, steps: int = STEPS) -> None:
    """Train into `cache/dit.pt`: flow matching with logit-normal noise levels (Esser et al., 2024)."""
    torch.manual_seed(0)
    texts = all_captions()
    batches = Batches(cache, texts, Texts(cache, texts), weigh)
    dit = new_dit().to(device())
    dit.set_attn_processor(WeighedJointAttention(ABSENT))
    schedule, teacher = FlowSchedule(NOISE), Teacher(cache, texts)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        latents, (hidden, pooled, rows) = batches.draw(BATCH * 2 // workers, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device())
        times = schedule.draw_timesteps(len(latents), generator).to(device())
        noisy = schedule.add_noise(latents, noise, times)
        taught, known = teacher.velocity(noisy, times / NOISE["num_train_timesteps"], rows)
        goal = torch.where(known.view(-1, 1, 1, 1), taught, schedule.target(latents, noise, times))
        with autocast("auto", device()):
            predicted = dit(noisy, hidden, pooled, times).sample
        return nn.functional.mse_loss(predicted.float(), goal)

    fit(
        "dit", dit, loss_of, steps=steps, learning_rate=LEARNING_RATE, restart=RESTART, cache=cache, rank=rank, workers=workers, save_every=100
    )  # fmt: skip
