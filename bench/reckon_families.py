"""What the families' networks compute and hold at their real shapes, counted as `reckon_sd14.py` does: no weights, no GPU.

    python bench/reckon_families.py [--only sdxl]

Prints a line a family and way: parameters, those that are trained, TFLOP of one prediction, TFLOP and GB of a step of model-based
training, each for one picture of 1024 pixels, in bf16. Configs are the published ones. What a machine takes is unmeasured.
"""

from __future__ import annotations

import argparse
import functools

import torch
from reckon_sd14 import computing_in, count, norms_in_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from concept_ablation.diffusion.families.base import Conditioning, Family
from concept_ablation.diffusion.families.flux import FAMILY as FLUX
from concept_ablation.diffusion.families.stable_diffusion_3 import FAMILY as SD3
from concept_ablation.diffusion.families.stable_diffusion_xl import FAMILY as SDXL
from concept_ablation.methods.ablation.losses import model_based_loss

CELLS = 128


def sdxl() -> nn.Module:
    from diffusers.models import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=CELLS,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3() -> nn.Module:
    from diffusers.models import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=CELLS,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def flux() -> nn.Module:
    from diffusers.models import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


# Family, its network, tokens and widths of its text's encoding, latents' channels.
SHAPES = {
    "sdxl": (SDXL, sdxl, (77, 2048, 1280), 4),
    "sd3": (SD3, sd3, (77 + 256, 4096, 2048), 16),
    "flux": (FLUX, flux, (512, 4096, 768), 16),
}


def inputs(family: Family, text: tuple[int, int, int], channels: int, pictures: int) -> tuple:
    tokens, width, pooled = text
    told = Conditioning(torch.empty(pictures, tokens, width), torch.empty(pictures, pooled))
    return (
        torch.empty(pictures, channels, CELLS, CELLS),
        torch.zeros(pictures),
        family.framed(told, [(1024, 0, 0)] * pictures),
    )


def reckon(name: str) -> None:
    """Print the lines of one family."""
    family, make, text, channels = SHAPES[name]
    network = make().eval().requires_grad_(False)
    trained = family.trainable_parameters(network, "cross-attn").values()

    def predict(*given) -> torch.Tensor:
        with computing_in("bf16"):
            return family.predict(network, *given)

    def sample(n: int) -> None:
        with torch.no_grad():
            predict(*inputs(family, text, channels, n))

    def step(n: int) -> None:
        noisy, timesteps, told = inputs(family, text, channels, n)
        mask = torch.ones(n, 1, CELLS, CELLS)
        model_based_loss(predict, predict, noisy, timesteps, told, told, mask).backward()
        network.zero_grad()

    sizes = [sum(value.numel() for value in values) / 1e6 for values in (network.parameters(), trained)]
    tflop, each, rest = count(network, sample)
    print(f"{name}: {sizes[0]:.0f} M parameters, {sizes[1]:.1f} M trained; a prediction {tflop:.2f} TFLOP, {each:.2f} GB a picture + {rest:.2f}", flush=True)  # fmt: skip
    for value in trained:
        value.requires_grad_(True)
    for checkpointing in (True, False):
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
        tflop, each, rest = count(network, functools.partial(step))
        print(f"  a step{', checkpointing' * checkpointing}: {tflop:.2f} TFLOP, {each:.2f} GB a picture + {rest:.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SHAPES))
    only = parser.parse_args().only
    with FakeTensorMode(allow_non_fake_inputs=True), norms_in_fp32():
        for name in [only] if only else SHAPES:
            reckon(name)


if __name__ == "__main__":
    main()
