"""Seconds a step and peak memory of each parameter group, on a model of Stable Diffusion 1.4's shape.

    python bench/train_sd14_shaped.py [--steps 20] [--batch-size 4] [--precision auto] [--device auto] [--tiny]

Prints a Markdown table. The weights are random and made here, from the configurations below: nothing is downloaded,
and speed and memory don't depend on them. One process a group, so that each has its own peak. On a CPU only
`--tiny` (a model of a million parameters, 64 px) is for trying.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from concept_ablation.common.hardware import pick_device, resolve_precision
from concept_ablation.diffusion.families.base import ParameterGroup
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.methods.ablation.token_embeddings import target_tokens
from concept_ablation.methods.ablation.training import Training

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # steps that aren't timed: memory is allocated and kernels are chosen
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # the rest is diffusers' default
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TINY_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_VAE = VAE | {"sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_pipeline(tiny: bool, device: torch.device):
    """A StableDiffusionPipeline with random weights on `device`; its tokenizer has one token a byte."""
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import make_tiny_tokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tiny_tokenizer(folder)
    text = TEXT | (TINY_TEXT if tiny else {})
    with device:
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**(TINY_VAE if tiny else VAE)),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**(TINY_UNET if tiny else UNET)),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval()
    return pipeline.to(device)


def settings_of(group: ParameterGroup, args: argparse.Namespace) -> TrainingSettings:
    """How `group` is trained: as by default, but for the command line's choices."""
    return TrainingSettings(
        group=group,
        loss="model-based",
        steps=args.steps + WARM_UP,
        learning_rate=1e-6,
        scale_lr="none",
        batch_size=args.batch_size,
        gradient_accumulation=1,
        gradient_checkpointing=args.gradient_checkpointing,
        optimizer={
            "name": args.optimizer,
            "beta1": 0.9,
            "beta2": 0.999,
            "weight_decay": 0.01,
            "epsilon": 1e-8,
        },
        lr_scheduler="constant",
        lr_warmup_steps=0,
        augmentation="compvis",
        mask_border=False,
        hflip=0.5,
        prior_preservation=args.prior_preservation,
        prior_form="doubled",
        prior_weight=1.0,
        max_grad_norm=1.0,
        precision=args.precision,
        teacher="current",
        detach_bos=True,
    )


def measure(group: ParameterGroup, args: argparse.Namespace) -> str:
    """Train `args.steps` steps; a row of the table."""
    device = pick_device(args.device)
    pipeline = make_pipeline(args.tiny, device)
    size = pipeline.vae.config.sample_size
    noise = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)
    data = AnchorData([Image.fromarray(pixels) for pixels in noise], ["a photo of a cat"] * len(noise))
    settings = settings_of(group, args)
    tokens = {"text_encoder": target_tokens(pipeline.tokenizer, ["owl"], "cat")}
    targets = [("a photo of an owl",)] * len(noise)
    training = Training(pipeline, data, targets, settings, seed=0, tokens=tokens)
    records = list(training)
    seconds = statistics.median(record.seconds for record in records[WARM_UP:])
    trained = sum(value.numel() for value in training.parameters.values())
    memory = records[-1].peak_memory_bytes / 2**30
    return f"| {group} | {trained:,} | {seconds:.3f} | {memory:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--groups", nargs="+", default=get_args(ParameterGroup), choices=get_args(ParameterGroup)
    )
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw8bit"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--prior-preservation", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at 64 px, to try the script")
    args = parser.parse_args()
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = [f"batch {args.batch_size}", resolve_precision(args.precision, device), args.optimizer]
    options += [
        text
        for text, on in (
            ("gradient checkpointing", args.gradient_checkpointing),
            ("prior preservation, doubled", args.prior_preservation),
        )
        if on
    ]
    print(f"{name}, {64 if args.tiny else 512} px, {', '.join(options)}; median of {args.steps} steps\n")
    print("| group | trained parameters | seconds a step | peak memory, GiB |\n|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for group in args.groups:
            print(pool.submit(measure, group, args).result(), flush=True)


if __name__ == "__main__":
    main()
