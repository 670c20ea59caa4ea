"""What merging many deltas costs: seconds and peak memory, with deltas of Stable Diffusion 1.4's keys and values.

    python bench/merge.py [--deltas 50] [--how closed-form sum ties] [--words 3000]

The deltas are random numbers of its 32 shapes, 77 MB each. A handful of files lies in a temporary folder and is read again and again,
so they come from the system's cache: a disk adds the time of reading 77 MB a delta (of `ties` twice that). Encoding the rows'
prompts and words isn't part of it; their tokens are random, too. Of closed-form the solving comes once, however many deltas there are:
it has the words in it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from concept_ablation.diffusion.delta import iterate_delta, save_delta
from concept_ablation.methods.ablation.preservation import second_moment
from concept_ablation.methods.merging import ClosedForm, add_up, ties

WIDTH, TOKENS = 768, 50 * 76  # of a row: 50 prompts without begin-of-text
OUTS = [320] * 5 + [640] * 5 + [1280] * 6  # layers that read the text
FILES = 4


def shapes() -> dict[str, tuple[int, int]]:
    return {
        f"unet.layer{n}.{part}.weight": (out, WIDTH)
        for n, out in enumerate(OUTS)
        for part in ("to_k", "to_v")
    }


def changes(base: dict[str, Tensor], folder: Path, count: int) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The changes of `count` deltas, read as the stage reads them."""
    for number in range(count):
        path = folder / f"{number % FILES}.safetensors"
        yield ((name, value - base[name]) for name, value in iterate_delta(path))


def merge(how: str, folder: Path, count: int, words: int, told: multiprocessing.Queue) -> None:
    """Merge in a process of its own, so that its peak is its own; tells seconds once and for all deltas, and MB before and at most."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    tokens = [torch.randn(1, TOKENS, WIDTH, generator=generator) for _ in range(FILES)]
    known = torch.randn(words, 76, WIDTH, generator=generator, dtype=torch.float16) if words else None
    before, began = peak(), time.monotonic()
    read = began
    if how == "closed-form":
        sums = ClosedForm()
        for number, change in enumerate(changes(base, folder, count)):
            sums.add(change, second_moment([tokens[number % FILES]]))
        read = time.monotonic()
        merged, _ = sums.solve(second_moment(tokens), 3.0, 3e-2, known, 1.15)
    elif how == "sum":
        merged = add_up(changes(base, folder, count))
    else:
        merged = ties(lambda: changes(base, folder, count), 0.2)
    save_delta(
        folder / "merged.safetensors", {name: base[name] + merged.pop(name) for name in list(merged)}, {}
    )
    end = time.monotonic()
    told.put(
        (end - read, read - began, before, peak())
        if how == "closed-form"
        else (0.0, end - began, before, peak())
    )


def peak() -> float:
    """MB of this process's memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--deltas", type=int, default=50, help="how many are merged")
    parser.add_argument(
        "--how", nargs="+", choices=("closed-form", "sum", "ties"), default=("closed-form", "sum", "ties")
    )
    parser.add_argument("--words", type=int, default=3000, help="that closed-form preserves")
    options = parser.parse_args()
    print(
        "| how | deltas | seconds once | a delta | 1,000 reckoned | MB before | MB at most |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(1)
        for number in range(FILES):
            tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
            save_delta(folder / f"{number}.safetensors", tensors, {})
        context = multiprocessing.get_context("spawn")
        for how in options.how:
            told = context.Queue()
            process = context.Process(target=merge, args=(how, folder, options.deltas, options.words, told))
            process.start()
            once, all_of_them, before, most = told.get()
            process.join()
            each = all_of_them / options.deltas
            minutes = (once + 1000 * each) / 60
            print(
                f"| {how} | {options.deltas} | {once:.0f} | {each:.2f} s | {minutes:.0f} min | {before:.0f} | {most:.0f} |"
            )


if __name__ == "__main__":
    main()
