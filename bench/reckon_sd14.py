"""What Stable Diffusion 1.4 computes and holds, counted on tensors without contents: no weights, no GPU, a few minutes.

    python bench/reckon_sd14.py [--side 512]

Prints two Markdown tables. TFLOP: 10^12 additions and multiplications, as `torch.utils.flop_counter` counts them. GB: 10^9
bytes of tensors alive at once, beyond the weights; attention is fused, as on a GPU, so that no attention matrix is held. Not
counted: the working space of kernels, what the allocator keeps for itself, CUDA's own memory. bf16 is autocast by CUDA's
rules, under which norms compute in fp32. So this is a reckoning: what a machine takes, `train_sd14_shaped.py` measures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import weakref
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop, sdpa_flop
from train_sd14_shaped import UNET, VAE

from concept_ablation.diffusion.families.base import ParameterGroup
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.methods.ablation.losses import model_based_loss

GROUPS: tuple[ParameterGroup, ...] = ("cross-attn", "attn", "full-weight")
# The CPU's fused attention has no formula of its own in torch; it takes the same arguments as CUDA's.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
register_flop_formula(CPU_ATTENTION, get_raw=True)(sdpa_flop)
register_flop_formula(CPU_ATTENTION_BACKWARD, get_raw=True)(sdpa_backward_flop)


class Bytes:
    """Adds up the storages of tensors while they live, those of `weights` apart: `now`, and `peak`, the most there was."""

    def __init__(self, weights: nn.Module) -> None:
        self.now = self.peak = 0
        self._apart = {value.untyped_storage()._cdata for value in weights.parameters()}
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes and storage._cdata not in self._apart:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


class Made(TorchDispatchMode):
    """Adds every tensor that is made inside to `held`."""

    def __init__(self, held: Bytes) -> None:
        super().__init__()
        self.held = held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.held.add(leaf)
        return result


def norms_in_fp32() -> contextlib.AbstractContextManager:
    """As under CUDA's autocast; the CPU's, which alone works here, leaves them in bf16."""
    norms = {name: getattr(F, name) for name in ("group_norm", "layer_norm")}
    own = {name: lambda x, *a, n=norm, **kw: n(x.float(), *a, **kw) for name, norm in norms.items()}
    return mock.patch.multiple(F, **own)


def computing_in(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def count(model: nn.Module, work: Callable[[int], None]) -> tuple[float, float, float]:
    """`work` on some pictures: TFLOP and GB at the peak a picture, and GB besides, however many pictures."""
    peaks = {}
    for pictures in (4, 8):
        held = Bytes(model)
        with FlopCounterMode(display=False) as flops, Made(held):
            work(pictures)
        peaks[pictures] = held.peak / 1e9
    return flops.get_total_flops() / 1e12 / 8, (peaks[8] - peaks[4]) / 4, 2 * peaks[4] - peaks[8]


def saved(model: nn.Module, work: Callable[[int], torch.Tensor]) -> float:
    """GB a picture that autograd keeps for the backward pass of what `work` gives."""
    kept = {}
    for pictures in (4, 8):
        held = Bytes(model)
        with saved_tensors_hooks(
            lambda tensor, held=held: (held.add(tensor), tensor)[1], lambda tensor: tensor
        ):
            work(pictures)
        kept[pictures] = held.peak / 1e9
    return (kept[8] - kept[4]) / 4


def inputs(pictures: int, cells: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(pictures, 4, cells, cells), torch.zeros(pictures), torch.empty(pictures, 77, 768)


@torch.no_grad()
def passes(unet: nn.Module, vae: nn.Module, cells: int) -> None:
    """Print a row for each kind of pass without a gradient. The VAE decodes in fp32 alone, as in `sampling`."""

    def predict(precision: str, n: int) -> None:
        with computing_in(precision):
            unet(*inputs(n, cells))

    def encode(precision: str, n: int) -> None:
        with computing_in(precision):
            vae.encode(torch.empty(n, 3, 8 * cells, 8 * cells))

    def decode(precision: str, n: int) -> None:
        with computing_in(precision):
            vae.decode(inputs(n, cells)[0])

    rows = [("U-Net", unet, predict, "fp32"), ("U-Net", unet, predict, "bf16")]
    rows += [("VAE, encode", vae, encode, "fp32"), ("VAE, encode", vae, encode, "bf16")]
    rows += [("VAE, decode", vae, decode, "fp32")]
    for name, model, work, precision in rows:
        tflop, each, rest = count(model, functools.partial(work, precision))
        print(f"| {name} | {precision} | {tflop:.2f} | {each:.2f} | {rest:.2f} |", flush=True)


def training(unet: nn.Module, group: ParameterGroup, cells: int, precision: str, checkpointing: bool) -> None:
    """Print a row: a picture's share in a step of model-based training, without its encoding by the VAE."""
    unet.requires_grad_(False)
    for parameter in FAMILY.trainable_parameters(unet, group).values():
        parameter.requires_grad_(True)
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()

    def predict(*given: torch.Tensor) -> torch.Tensor:
        with computing_in(precision):
            return unet(*given).sample

    def loss(n: int) -> torch.Tensor:
        noisy, timesteps, text = inputs(n, cells)
        return model_based_loss(
            predict, predict, noisy, timesteps, text, text, torch.ones(n, 1, cells, cells)
        )

    def step(n: int) -> None:
        loss(n).backward()
        unet.zero_grad()

    with FAMILY.detach_bos(unet):
        kept, (tflop, each, rest) = saved(unet, loss), count(unet, step)
    name = f"{group}, checkpointing" if checkpointing else group
    print(f"| {name} | {precision} | {tflop:.2f} | {kept:.2f} | {each:.2f} | {rest:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=512, help="of a picture, pixels")
    cells = parser.parse_args().side // 8
    from diffusers.models import AutoencoderKL, UNet2DConditionModel

    with FakeTensorMode(), norms_in_fp32():
        unet, vae = UNet2DConditionModel(**UNET).eval(), AutoencoderKL(**VAE).eval()
        sizes = [sum(value.numel() for value in model.parameters()) * 4 / 1e9 for model in (unet, vae)]
        print(f"{8 * cells} px; weights in fp32: U-Net {sizes[0]:.2f} GB, VAE {sizes[1]:.2f} GB\n")
        print("| pass | in | TFLOP a picture | GB a picture | GB besides |\n|---|---|---|---|---|")
        passes(unet, vae, cells)
        print("\n| training | in | TFLOP a picture | GB kept for backward | GB a picture | GB besides |")
        print("|---|---|---|---|---|---|")
        for group in GROUPS:
            for precision in ("fp32", "bf16"):
                for checkpointing in (False, True):
                    training(unet, group, cells, precision, checkpointing)


if __name__ == "__main__":
    main()
