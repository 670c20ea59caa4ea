"""Runs the authors' code beside ours, on the same weights, latents, noise, timesteps, prompts and masks.

    python bench/faithfulness.py CHECKOUT [--model embedded/emoji-diffusion] [--steps 3] [--output table.md]

CHECKOUT is a checkout of nupurkmr9/concept-ablation (commit c11fb1b). Prints, for each case, how far losses and
gradients lie apart, and fails if it is more than 1e-5 (losses) or 1e-4 (gradients), relative. One thread, fp32,
about three minutes. The CompVis half needs `pip install einops`. docs/faithfulness.md says what of theirs runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concept_ablation.diffusion.families.base import Conditioning
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.data import AnchorData, Batch, View, augment
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
# What to compare in the diffusers code: a name, our settings, and whether its augmentation is on.
CASES = [
    ("cross-attn, model-based", {}, False),
    ("... with augmentation", {}, True),
    ("... with prior preservation", {"prior_preservation": True}, False),
    ("... with both", {"prior_preservation": True}, True),
    ("cross-attn, noise-based, both", {"loss": "noise-based", "prior_preservation": True}, True),
    ("attn, model-based, both", {"group": "attn", "prior_preservation": True}, True),
    ("full-weight, model-based, both", {"group": "full-weight", "prior_preservation": True}, True),
]


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


# ---- ours ----


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


# ---- theirs, diffusers ----


def copy_diffusers(checkout: Path, scratch: Path) -> ModuleType:
    """Their diffusers folder with the two changes that today's libraries ask for; its `train` module."""
    folder = scratch / "diffusers"
    shutil.copytree(checkout / "diffusers", folder)
    (folder / "openai.py").write_text("")
    file = folder / "model_pipeline.py"
    file.write_text(file.read_text().replace("CLIPFeatureExtractor", "CLIPImageProcessor"))
    sys.path.insert(0, str(folder))
    return importlib.import_module("train")


def run_diffusers(train: ModuleType, model: Path, folder: Path, settings: TrainingSettings, augmented: bool):
    """Their `main`, whole, for `settings.steps` steps: the steps and the weights in its delta.bin."""
    arguments = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": folder / "images.txt",
        "instance_prompt": folder / "caption.txt",
        "class_data_dir": folder / "images.txt",
        "class_prompt": folder / "caption.txt",
        "caption_target": "cat+pouting cat",
        "concept_type": "object",
        "output_dir": folder / "out",
        "resolution": Image.open(folder / "0.png").width,
        "dataloader_num_workers": 0,
        "train_batch_size": settings.batch_size,
        "max_train_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_warmup_steps": 0,
        "parameter_group": settings.group,
        "loss_type_reverse": settings.loss,
        "prior_loss_weight": settings.prior_weight,
        "seed": 42,
    }
    line = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    line += ["--scale_lr", "--center_crop"] + (
        ["--with_prior_preservation"] if settings.prior_preservation else []
    )
    args = train.parse_args(line + ([] if augmented else ["--noaug"]))
    args.report_to = None
    steps, batches, drawn = [], [], []
    collate, backward, add_noise = train.collate_fn, train.Accelerator.backward, train.DDPMScheduler.add_noise

    def record_batch(examples, prior):
        batches.append(collate(examples, prior))
        return batches[-1]

    def record_draw(self, latents, noise, timesteps):
        drawn.append((latents.clone(), noise.clone(), timesteps.clone()))
        return add_noise(self, latents, noise, timesteps)

    def record_step(self, loss, **kwargs):
        backward(self, loss, **kwargs)
        own = {
            f"unet.{name}": value for name, value in self._models[0].named_parameters() if value.requires_grad
        }
        weights = {name: value.detach().clone() for name, value in own.items()}
        gradients = {name: value.grad.clone() for name, value in own.items()}
        steps.append(Step(None, None, weights, loss.item(), gradients))

    with (
        mock.patch.object(train, "collate_fn", record_batch),
        mock.patch.object(train.DDPMScheduler, "add_noise", record_draw),
        mock.patch.object(train.Accelerator, "backward", record_step),
    ):
        train.main(args)
    tokenizer = load_pipeline(model, device="cpu").tokenizer
    for step, batch, draw in zip(steps, batches, drawn, strict=False):
        step.target, step.prior = split(tokenizer, batch, draw)
    final = torch.load(folder / "out" / "delta.bin", weights_only=True)["unet"]
    return steps, {f"unet.{name}": value for name, value in final.items()}


def split(tokenizer, batch: Mapping, draw: tuple) -> tuple[Half, Half | None]:
    """Their batch as halves: first the target's images, then, with prior preservation, as many prior images."""

    def read(ids: Tensor) -> list[str]:
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        again = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(again, ids), "a prompt that its tokens don't give back"
        return prompts

    prompts, anchors = read(batch["input_ids"]), read(batch["input_anchor_ids"])
    count = len(anchors)

    def half(part: slice, own: list[str]) -> Half:
        return Half(*(tensor[part] for tensor in draw), prompts[part], own, batch["mask"][part])

    prior = half(slice(count, None), prompts[count:]) if len(prompts) > count else None
    return half(slice(count), anchors), prior


def control(name: str, changes: Mapping, *arguments) -> str:
    """That a comparison notices a wrong setting: its difference must be far over the limits."""
    found = compare(name, arguments[0], dataclasses.replace(arguments[1], **changes), *arguments[2:])
    assert max(found.loss / LOSS_LIMIT, found.gradient / GRADIENT_LIMIT) > 100, f"{name} goes unnoticed"
    return f"| {found.name} | {found.loss:.1e} | {found.gradient:.1e} | {found.final:.1e} |"


def diffusers_cases(checkout: Path, model: Path, scratch: Path, steps: int) -> Iterator[Difference | str]:
    """Every case of `CASES`, and two controls."""
    train = copy_diffusers(checkout, scratch)
    draw_images(model, scratch)
    for name, changes, augmented in CASES:
        settings = dataclasses.replace(SETTINGS, steps=steps, **changes)
        recorded, final = run_diffusers(train, model, scratch, settings, augmented)
        assert len(recorded) == steps
        masked = min(float(step.target.mask.mean()) for step in recorded)
        assert masked < 1, "their masks cover no cell"
        arguments = (lambda: load_pipeline(model, device="cpu"), settings, recorded, final)
        yield compare(f"diffusers: {name}", *arguments)
        if not changes and not augmented:
            yield control("control: gradient through the first token too", {"detach_bos": False}, *arguments)
        if settings.prior_preservation and not augmented:
            yield control("control: the prior's loss in CompVis' form", {"prior_form": "halved"}, *arguments)


def draw_images(model: Path, folder: Path) -> None:
    """A picture of each of `PROMPTS` by the model, and the two lists that their code reads."""
    pipeline = load_pipeline(model, device="cpu")
    generator = torch.Generator().manual_seed(0)
    images = pipeline(PROMPTS, num_inference_steps=8, guidance_scale=3.0, generator=generator).images
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    (folder / "images.txt").write_text("\n".join(str(folder / f"{n}.png") for n in range(len(images))) + "\n")
    (folder / "caption.txt").write_text("\n".join(PROMPTS) + "\n")


def augmentation_difference() -> float:
    """The largest difference of pixels and masks between their `preprocess` and our `augment`, all scales of 64 px."""
    dataset, size = sys.modules["utils"].CustomDiffusionDataset, 64
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))
    largest = 0.0
    for scale in range(size // 3, int(1.4 * size)):
        for share in (0.0, 0.4, 1.0):
            offset = int(share * abs(size - scale))
            with mock.patch.object(np.random, "randint", lambda *a, offset=offset: offset):
                pixels, mask = dataset.preprocess(SimpleNamespace(size=size), image, scale, Image.LANCZOS)
            rng = SimpleNamespace(
                random=lambda scale=scale: 0.0 if scale <= size else 1.0,
                randint=lambda *a, scale=scale: scale,
                randrange=lambda *a, scale=scale, offset=offset: offset if len(a) == 1 else scale,
                choice=lambda choices: choices[0],
            )
            view = augment(image, "diffusers", 8, rng, mask_border=True)
            largest = max(
                largest, float((view.pixels - torch.from_numpy(pixels).permute(2, 0, 1)).abs().max())
            )
            if mask.any():  # theirs may be empty, and its loss not a number; ours keeps a cell
                largest = max(largest, float((view.mask[0] - torch.from_numpy(mask)).abs().max()))
    return largest


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
        if "utils" in sys.modules:
            print(f"augmentation, pixels and masks: at most {augmentation_difference():.1e} apart")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return int(worst[0] > LOSS_LIMIT or worst[1] > GRADIENT_LIMIT)


if __name__ == "__main__":
    sys.modules["faithfulness"] = sys.modules["__main__"]  # so that the other half finds these classes
    sys.exit(main())
