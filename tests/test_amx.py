"""A machine that announces AMX and hides its tiles must not end a job with an illegal instruction."""

import os
import platform
import subprocess
import sys

import pytest

from concept_ablation.common.amx import TILES, VARIABLE, avoid_hidden_tiles, cpuid, hides_tiles

AMX = "flags : fpu avx512_bf16 amx_bf16 amx_tile amx_int8"
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is an instruction of x86-64")


@X86
@pytest.mark.parametrize(
    ("cpuinfo", "leaves", "hidden"),
    [
        (AMX, {0: 0x20, TILES: 1}, False),
        (AMX, {0: 0x20, TILES: 0}, True),
        (AMX, {0: 0x1C}, True),
        ("flags : fpu avx512_bf16", {0: 0x1C}, False),
    ],
)
def test_tiles_are_hidden(cpuinfo, leaves, hidden):
    assert hides_tiles(cpuinfo, leaves.__getitem__) is hidden


@X86
def test_where_no_code_may_be_made_nothing_is_changed():
    def refuse(leaf):
        raise PermissionError(13, "Permission denied")

    assert not hides_tiles(AMX, refuse)


@X86
def test_cpuid_reads_the_machine():
    assert cpuid(0) >= 7  # the last leaf there is: AVX2 alone is in leaf 7


def test_the_user_has_the_last_word():
    environment = {VARIABLE: "DEFAULT"}
    avoid_hidden_tiles(environment)
    assert environment == {VARIABLE: "DEFAULT"}


def test_a_bf16_product_works_on_this_machine():
    """In a process of its own, since it would take this one with it."""
    code = (
        "from concept_ablation.common.amx import avoid_hidden_tiles\n"
        "avoid_hidden_tiles()\n"
        "import torch\n"
        "with torch.autocast('cpu', torch.bfloat16): torch.nn.Linear(64, 256)(torch.ones(1, 64))"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
