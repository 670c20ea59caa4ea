"""A tiny Stable-Diffusion-1-shaped pipeline with random weights, for tests: made in a second, no download.

It has every part of the real thing (tokenizer, CLIP text encoder, UNet with cross-attention, VAE, scheduler)
and about a million parameters. Its pictures are noise, but they depend on the prompt and on the seed.
"""

import json
from pathlib import Path

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_tiny_pipeline(
    folder: str | Path,
    *,
    size: int = 64,
    vae_factor: int = 8,
    latent_channels: int = 4,
    prediction_type: str = "epsilon",
    activation: str = "quick_gelu",
    seed: int = 0,
) -> Path:
    """Write a tiny ``StableDiffusionPipeline`` to ``folder`` and return the folder.

    ``activation`` is the text encoder's. ``size`` is the side of an image in pixels, ``vae_factor`` (a power of two) that of one latent cell.
    Any text tokenises: one token a byte, 77 tokens at most.
    """
    import torch
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers import PNDMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    levels = vae_factor.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    hidden_act=activation,
                    max_position_embeddings=77,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            unet=UNet2DConditionModel(
                sample_size=size // vae_factor,
                in_channels=latent_channels,
                out_channels=latent_channels,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
            vae=AutoencoderKL(
                sample_size=size,
                latent_channels=latent_channels,
                block_out_channels=(8,) * (levels - 1) + (16,),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=1,
                norm_num_groups=4,
            ),
            scheduler=PNDMScheduler(
                num_train_timesteps=1000,
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                skip_prk_steps=True,
                steps_offset=1,
                set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    # A random text encoder hardly tells prompts apart: louder token embeddings make every word count.
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.mul_(10)
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_tokenizer(folder: str | Path):
    """Write and return a CLIP tokenizer without merges: one token a byte, another for a word's last byte."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + extra) for extra in range(256 - len(letters))]
    words = letters + [letter + "</w>" for letter in letters] + [BOS, EOS]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
