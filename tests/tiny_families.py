"""Tiny pipelines with random weights of the families beside Stable Diffusion 1, made from configs: no download.

Each has every part of the real one and takes the same path through diffusers. Their pictures are noise, but depend on prompt and seed:
they show that all is joined rightly, not that anything is erased.
"""

import string
from pathlib import Path

import torch

from tests.tiny import make_tiny_pipeline, make_tiny_tokenizer

SIDE = 32  # pixels of a picture
WIDTH = 32  # of the CLIP text encoders, and of their pooled encodings


def make_tiny_sd2(folder: str | Path) -> Path:
    """Stable Diffusion 2's: it predicts velocity, and its text encoder has OpenCLIP's activation, in transformers' form."""
    return make_tiny_pipeline(folder, size=SIDE, prediction_type="v_prediction", activation="gelu")


def make_tiny_sdxl(folder: str | Path, seed: int = 0) -> Path:
    """A `StableDiffusionXLPipeline` of SIDE pixels, whose VAE has a cell of 2 pixels as its own sides ask for 16 of them."""
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers import EulerDiscreteScheduler

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            **_clip(folder, "", projects=False),
            **_clip(folder, "_2"),
            unet=UNet2DConditionModel(
                sample_size=SIDE // 2,
                block_out_channels=(16, 32),
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=2 * WIDTH,
                attention_head_dim=(2, 4),
                norm_num_groups=8,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            ),
            vae=_vae(AutoencoderKL, 4, scaling_factor=0.13025),
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
            ),
        )
    return _save(pipeline, folder)


def make_tiny_sd3(folder: str | Path, third: bool = True, seed: int = 0) -> Path:
    """A `StableDiffusion3Pipeline` of SIDE pixels. third: whether it has T5."""
    from diffusers.models import AutoencoderKL, SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            **_clip(folder, ""),
            **_clip(folder, "_2"),
            **(_t5(folder, "_3") if third else {"text_encoder_3": None, "tokenizer_3": None}),
            transformer=SD3Transformer2DModel(
                sample_size=SIDE // 2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=32,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=16,
            ),
            vae=_vae(AutoencoderKL, 16, scaling_factor=1.5305, shift_factor=0.0609),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        _wake(pipeline.transformer)
    return _save(pipeline, folder)


def make_tiny_flux(folder: str | Path, guided: bool = True, seed: int = 0) -> Path:
    """A `FluxPipeline`. guided: whether guidance is an input, as in FLUX.1-dev. Its pictures' side is to be asked for: SIDE."""
    from diffusers.models import AutoencoderKL, FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            **_clip(folder, "", projects=False),
            **_t5(folder, "_2"),
            transformer=FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=2 * WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guided,
                axes_dims_rope=(2, 2, 4),
            ),
            vae=_vae(AutoencoderKL, 16, scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
        _wake(pipeline.transformer)
    return _save(pipeline, folder)


def _clip(folder: Path, suffix: str, projects: bool = True) -> dict:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = make_tiny_tokenizer(folder / f"tokenizer{suffix}")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}


def _t5(folder: Path, suffix: str) -> dict:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [("▁", -2.0), *((letter, -3.0) for letter in string.ascii_letters + string.digits + ".,-'")]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}


def _vae(make, channels: int, **config):
    return make(
        sample_size=SIDE,
        latent_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )


@torch.no_grad()
def _wake(transformer) -> None:
    """Give layers that start from zero, so that nothing they read counts, random weights."""
    for value in transformer.parameters():
        if not value.any():
            value.normal_(std=0.02)


@torch.no_grad()
def _save(pipeline, folder: Path) -> Path:
    # A random text encoder hardly tells prompts apart: louder token embeddings make every word count.
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).get_input_embeddings().weight.mul_(10)
    pipeline.save_pretrained(folder)
    return folder
