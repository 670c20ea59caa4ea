"""The device and the precision that work runs in, and the memory that it took.

torch is imported inside the functions that need it: a script that only moves files starts in a fraction of a second.
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
    """A device or a precision that isn't there; the message says what is allowed."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is cuda, then mps, then cpu. Raises DeviceError if it isn't there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in there if there[kind]) if name == "auto" else name.partition(":")[0]
    if not there.get(kind):
        usable = ", ".join(["auto", *(kind for kind in there if there[kind])])
        raise DeviceError(f"device {name!r} is not available here (allowed: {usable})")
    return torch.device(kind if name == "auto" else name)


def resolve_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on `device`; other names pass if the device can do them.

    bf16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX), else fp16 on
    CUDA, else fp32. Only ever a precision of computation (autocast): weights stay fp32. Raises DeviceError.
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


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a model computes in `precision` on `device`, its weights left as they are."""
    import torch

    resolved = resolve_precision(precision, device)
    if resolved == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if resolved == "bf16" else torch.float16)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of this process's CUDA tensors, on other devices of the process itself."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
