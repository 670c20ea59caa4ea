"""Runs the authors' code beside ours, on the same weights, latents, noise, timesteps, prompts and masks.

    python bench/faithfulness.py CHECKOUT [--model embedded/emoji-diffusion] [--steps 3] [--output table.md]

CHECKOUT is a checkout of nupurkmr9/concept-ablation (commit c11fb1b). Prints, for each case, how far losses and
gradients lie apart, and fails if it is more than 1e-5 (losses) or 1e-4 (gradients), relative. One thread, fp32,
about three minutes. The CompVis half needs `pip install einops omegaconf`. docs/faithfulness.md says what of theirs runs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from faithfulness_steps import GRADIENT_LIMIT, LOSS_LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--model", type=Path, default=Path("embedded/emoji-diffusion"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table here")
    parser.add_argument("--only", choices=["diffusers", "compvis"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| case | loss | gradient | weights after all steps |", "|---|---|---|---|"]
    worst = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.copytree(args.model, scratch / "model")  # so that nobody trains it meanwhile
        cases = []
        if args.only != "compvis":
            from faithfulness_diffusers import diffusers_cases

            cases.append(diffusers_cases(args.checkout.resolve(), scratch / "model", scratch, args.steps))
        if args.only != "diffusers":
            from faithfulness_compvis import compvis_cases

            cases.append(compvis_cases(args.checkout.resolve(), args.steps))
        for found in (difference for part in cases for difference in part):
            if isinstance(found, str):
                lines.append(found)
                continue
            worst = [max(worst[0], found.loss), max(worst[1], found.gradient)]
            lines.append(f"| {found.name} | {found.loss:.1e} | {found.gradient:.1e} | {found.final:.1e} |")
            print(lines[-1], flush=True)
        if args.only != "compvis":
            from faithfulness_diffusers import augmentation_difference

            print(f"augmentation, pixels and masks: at most {augmentation_difference():.1e} apart")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return int(worst[0] > LOSS_LIMIT or worst[1] > GRADIENT_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
