"""The diffusers half of bench/faithfulness.py: their `train.main`, recorded, beside our `Training`."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from faithfulness_steps import GRADIENT_LIMIT, LOSS_LIMIT, PROMPTS, SETTINGS, Difference, Half, Step, compare
from PIL import Image
from torch import Tensor

from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.data import augment
from concept_ablation.methods.ablation.settings import TrainingSettings

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


def copy_diffusers(checkout: Path, scratch: Path) -> ModuleType:
    """Their diffusers folder with the two changes that today's libraries ask for; its `train` module."""
    folder = scratch / "diffusers"
    shutil.copytree(checkout / "diffusers", folder)
    (folder / "openai.py").write_text("")
    file = folder / "model_pipeline.py"
    file.write_text(file.read_text().replace("CLIPFeatureExtractor", "CLIPImageProcessor"))
    sys.path.insert(0, str(folder))
    return importlib.import_module("train")


def arguments(model: Path, folder: Path, settings: TrainingSettings, augmented: bool) -> list[str]:
    """Their command line for `settings`."""
    options = {
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
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    line += ["--scale_lr", "--center_crop"]
    line += ["--with_prior_preservation"] if settings.prior_preservation else []
    return line if augmented else [*line, "--noaug"]


def run_diffusers(train: ModuleType, model: Path, folder: Path, settings: TrainingSettings, augmented: bool):
    """Their `main`, whole, for `settings.steps` steps: the steps and the weights in its delta.bin."""
    args = train.parse_args(arguments(model, folder, settings, augmented))
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
