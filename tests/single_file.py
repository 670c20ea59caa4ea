"""A diffusers pipeline as one file, as CompVis's code writes it: the names of the UNet, VAE and text encoder changed."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from concept_ablation.diffusion.compvis import compvis_names

VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}


def write_single_file(pipeline, path) -> Path:
    """Write `pipeline` to `path`: .safetensors, or a pickled .ckpt with its tensors under `state_dict`."""
    unet = pipeline.unet.state_dict()
    names = compvis_names(unet, pipeline.unet.config)
    state = {names[name]: value for name, value in unet.items()}
    levels = len(pipeline.vae.config.block_out_channels)
    state |= {
        f"first_stage_model.{_vae_name(name, levels)}": _as_conv(name, value)
        for name, value in pipeline.vae.state_dict().items()
    }
    state |= {
        f"cond_stage_model.transformer.text_model.{name}": value
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    state = {name: value.contiguous() for name, value in state.items()}
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 1}, path)
    return path


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"resnets\.(\d+)", r"block.\1", name).replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.block\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in VAE_PARTS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _as_conv(name: str, value: torch.Tensor) -> torch.Tensor:
    """The VAE's attention is made of 1 x 1 convolutions there."""
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value
