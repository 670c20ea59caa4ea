"""Switch AMX off in oneDNN, torch's library of CPU kernels, on machines that don't describe their AMX tiles.

Some virtual machines announce AMX (matrix units of Intel CPUs since 2023) but leave out CPUID leaf 0x1D, which
describes the tiles. oneDNN doesn't notice the contradiction. It loads a configuration without tiles, and the first
bf16 matrix product ends the process with an illegal instruction.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "ONEDNN_MAX_CPU_ISA"
TILES = 0x1D  # the CPUID leaf whose EAX is the number of the last tile palette
# push rbx; mov eax, edi; xor ecx, ecx; cpuid; pop rbx; ret
CPUID = bytes.fromhex("53 89f8 31c9 0fa2 5b c3")


def cpuid(leaf: int) -> int:
    """Register EAX of a CPUID leaf. For x86-64, not on Windows. Raises OSError if memory can't be made executable."""
    page = mmap.mmap(-1, len(CPUID), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(CPUID)
    call = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32)
    return call(ctypes.addressof(ctypes.c_char.from_buffer(page)))(leaf)


def hides_tiles(cpuinfo: str, cpuid=cpuid) -> bool:
    """Whether the machine announces AMX but doesn't describe its tiles. `cpuinfo`: the text of /proc/cpuinfo."""
    if "amx_tile" not in cpuinfo or platform.machine() != "x86_64":
        return False
    try:
        return cpuid(0) < TILES or cpuid(TILES) == 0
    except OSError:
        return False


def avoid_hidden_tiles(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit oneDNN to instructions without AMX where that is needed and not set. Call it before the first product."""
    info = Path("/proc/cpuinfo")
    if VARIABLE not in environment and info.exists() and hides_tiles(info.read_text()):
        environment[VARIABLE] = "AVX512_CORE_FP16"
