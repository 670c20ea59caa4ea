"""What training, or drawing by, several rows in one batch could save at most: a sample's share of a batch's time, by its size.

    python bench/rows_together.py                       # docs/performance.md holds what it prints
    python bench/rows_together.py --model PATH --size 64 --device cuda --batch 4

Rows differ in keys and values alone, so N rows of one anchor could be N times as large a batch, in which each sample has its own row's
keys and values. That can't be faster than one row's batch that is N times as large, which is measured here: the products a sample come
on top. Sizes are measured in turn, `--rounds` times; medians of CPU seconds (on a GPU of seconds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from concept_ablation.common.hardware import autocast
from concept_ablation.diffusion.families.base import Conditioning, family_of
from concept_ablation.diffusion.pipeline import load_pipeline

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "embedded" / "emoji-diffusion"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--batch", type=int, default=16, help="samples of one row")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(options.model, device=options.device)
    family = family_of(pipeline)
    network = family.network(pipeline).requires_grad_(False)
    for value in family.trainable_parameters(network, "cross-attn").values():
        value.requires_grad_(True)
    with torch.no_grad():
        told = family.encode_prompts(pipeline, ["a picture"])

    def seconds(samples: int, trained: bool) -> float:
        """Of one prediction for so many samples; with the gradient for keys and values if it is a training's."""
        shape = samples, family.latent_channels(pipeline), options.size, options.size
        noisy = torch.randn(shape, device=options.device)
        times = torch.full((samples,), 500, device=options.device)
        started = _now(options.device)
        with torch.set_grad_enabled(trained), autocast("auto", torch.device(options.device)):
            predicted = family.predict(network, noisy, times, Conditioning.join([told] * samples))
        if trained:
            predicted.float().square().mean().backward()
        return _now(options.device) - started

    print(
        "| rows in a batch | samples | training: ms a sample | against one row | drawing: ms a sample | against one row |"
    )
    print("|---|---|---|---|---|---|")
    found: dict[tuple[int, bool], list[float]] = {}
    for _ in range(options.rounds):
        for rows in options.rows:
            for trained in (True, False):
                samples = options.batch * rows * (1 if trained else 2)  # guidance predicts twice
                found.setdefault((rows, trained), []).append(seconds(samples, trained) / samples)
    middle = {key: statistics.median(values[1:]) for key, values in found.items()}
    for rows in options.rows:
        cells = [f"{rows}", f"{options.batch * rows}"]
        for trained in (True, False):
            own, one = middle[rows, trained], middle[options.rows[0], trained]
            cells += [f"{1000 * own:.2f}", f"{one / own:.2f}"]
        print(f"| {' | '.join(cells)} |")


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
