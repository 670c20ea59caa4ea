"""Choose the device and the precision of computation, and measure peak memory.

torch is imported inside the functions that need it, so that a script without torch starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import TYPE_CHECKING, Literal, get_args

from concept_ablation.common.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class DeviceError(UserError):
    """A device or a precision is not available; the message says what is allowed."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` takes the first available of cuda, mps, cpu. Raises DeviceError."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in there if there[kind]) if name == "auto" else name.partition(":")[0]
    if not there.get(kind):
        usable = ", ".join(["auto", *(kind for kind in there if there[kind])])
        raise DeviceError(f"device {name!r} is not available here (allowed: {usable})")
    return torch.device(kind if name == "auto" else name)


def resolve_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The precision that `name` means on `device`. Raises DeviceError for one that the device can't compute in.

    `auto` is bf16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX), else fp16 on
    CUDA, else fp32. The precision is that of computation (autocast) only: weights stay as a family holds them.
    """
    if name not in get_args(Precision):
        raise DeviceError(f"precision {name!r} is unknown (allowed: {', '.join(get_args(Precision))})")
    if name == "fp16" and device.type != "cuda":
        raise DeviceError(
            f"precision 'fp16' needs a CUDA device, not {device.type!r} (allowed: auto, fp32, bf16)"
        )
    if name != "auto":
        return name
    if device.type == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_precision(network: torch.nn.Module, precision: Precision, device: torch.device) -> None:
    """Raises DeviceError if `network` would compute in fp32 with weights that are held in half precision."""
    import torch

    half = {value.dtype for value in network.parameters()} & {torch.bfloat16, torch.float16}
    if half and resolve_precision(precision, device) == "fp32":
        raise DeviceError(
            f"precision {precision!r}: this model's weights are held in half precision on {device.type!r}, so it can't compute in "
            "fp32 (allowed: bf16, or auto where the hardware has it)"
        )


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which models compute in `precision` on `device`. Their weights are not converted."""
    import torch

    resolved = resolve_precision(precision, device)
    if resolved == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if resolved == "bf16" else torch.float16)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on CUDA that of this process's tensors, on other devices that of the whole process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def peak_resident() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
