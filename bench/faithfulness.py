"""Runs the authors' code beside ours, on the same weights, latents, noise, timesteps, prompts and masks.

    python bench/faithfulness.py CHECKOUT [--model embedded/emoji-diffusion] [--steps 3] [--output table.md]

CHECKOUT is a checkout of nupurkmr9/concept-ablation (commit c11fb1b). Prints, for each case, how far losses and
gradients lie apart, and fails if it is more than 1e-5 (losses) or 1e-4 (gradients), relative. One thread, fp32,
about three minutes. The CompVis half needs `pip install einops omegaconf`. docs/faithfulness.md says what of theirs runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from concept_ablation.diffusion.families.base import Conditioning
from concept_ablation.methods.ablation.data import AnchorData, Batch, View
from concept_ablation.methods.ablation.draws import BatchDraws, LossDraws
from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.methods.ablation.training import Training

LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
PROMPTS = [
    "a cat",
    "a red cat",
    "a photo of a cat",
    "a blue cat",
    "two cats",
    "a yellow cat",
    "a cat on a mat",
    "cat",
]
ADAMW = {"name": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "epsilon": 1e-8}
SETTINGS = TrainingSettings(
    group="cross-attn",
    loss="model-based",
    steps=3,
    learning_rate=1e-5,
    scale_lr="diffusers",
    batch_size=4,
    gradient_accumulation=1,
    gradient_checkpointing=False,
    optimizer=ADAMW,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    augmentation="none",
    mask_border=True,
    hflip=0.0,
    prior_preservation=False,
    prior_form="doubled",
    prior_weight=1.0,
    max_grad_norm=1.0,
    precision="fp32",
    teacher="current",
    detach_bos=True,
)


@dataclasses.dataclass
class Half:
    """The images of one loss in a step: what was drawn for them. `mask` (n, 1, cells, cells)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list
    anchors: list
    mask: Tensor


@dataclasses.dataclass
class Step:
    """One step of theirs: its halves, the trained weights before it, its loss, and its gradients, by our names."""

    target: Half
    prior: Half | None
    weights: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


@dataclasses.dataclass
class Difference:
    """The largest of a case: relative difference of losses, of gradient tensors, of weights at the end."""

    name: str
    loss: float
    gradient: float
    final: float


def replay(
    pipeline, settings: TrainingSettings, steps: Sequence[Step], texts: Mapping | None = None
) -> Training:
    """Our training, its random draws replaced by those recorded. `texts`: encodings, if there's no text encoder."""
    data = AnchorData([Image.new("RGB", (8, 8))], [""])
    training = Training(pipeline, data, [("",)], settings, seed=0)
    batches = [BatchDraws(as_draws(step.target), step.prior and as_draws(step.prior)) for step in steps]
    training._draws = SimpleNamespace(next_batch=iter(batches).__next__)
    encoder = training._objective.encoder
    encoder.latents = lambda batch, noise: noise  # theirs were recorded, see `as_draws`
    if texts is not None:
        encoder.text = lambda prompts: Conditioning(torch.stack([texts[prompt] for prompt in prompts]))
    return training


def as_draws(half: Half) -> LossDraws:
    """What was recorded as if we had drawn it, with the latents in the place of the noise that would draw them."""
    views = [View(torch.zeros(3, 8, 8), mask, "", False) for mask in half.mask]
    batch = Batch(list(range(len(views))), [False] * len(views), views)
    return LossDraws(batch, half.prompts, half.anchors, half.latents, half.noise, half.timesteps)


def compare(name: str, make_pipeline, settings: TrainingSettings, steps, final, texts=None) -> Difference:
    """Each step from their weights, then all steps on our own; `final`: their weights at the end, or None."""
    training, losses, gradients = replay(make_pipeline(), settings, steps, texts), [0.0], [0.0]
    for step in steps:
        with torch.no_grad():
            for parameter, value in training.parameters.items():
                value.copy_(step.weights[parameter])
        loss, prior = one_step(training)
        total = loss + settings.prior_weight * prior if settings.prior_preservation else loss
        losses.append(abs(total - step.loss) / abs(step.loss))
        scale = max(float(value.norm()) for value in step.gradients.values())
        for parameter, value in training.parameters.items():
            theirs = step.gradients[parameter]
            # A tensor with next to no gradient of its own is measured against the largest one's.
            size = max(float(theirs.norm()), 1e-6 * scale)
            gradients.append(float((value.grad - theirs).norm()) / size)
            value.grad = None
    moved = float("nan")
    if final is not None:
        training = replay(make_pipeline(), settings, steps, texts)
        list(training)
        before = steps[0].weights
        apart = sum(float((v.detach() - final[n]).square().sum()) for n, v in training.parameters.items())
        way = sum(float((before[n] - final[n]).square().sum()) for n in training.parameters)
        moved = (apart / way) ** 0.5
    return Difference(name, max(losses), max(gradients), moved)


def one_step(training: Training) -> tuple[float, float]:
    """The losses and gradients of a step, which isn't taken."""
    detached = training.family.detach_bos(training.network)
    with detached if training.settings.detach_bos else contextlib.nullcontext():
        return training._backward()


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
    sys.modules["faithfulness"] = sys.modules["__main__"]  # so that the other half finds these classes
    sys.exit(main())
