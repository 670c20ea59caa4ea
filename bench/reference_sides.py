"""The two sides of `reference.py`, each of which measures itself in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import NamedTuple

BATCH, EVAL_BATCH, OUR_BATCH = 4, 10, 16
THEIR_STEPS, EVAL_STEPS, OUR_STEPS = 25, 50, 8


class Part(NamedTuple):
    """What a side measured of one thing: CPU seconds of each, and the most memory (MB) while it was done."""

    seconds: list[float]
    memory: float


class Meter:
    """Times things one after the other in this process: CPU seconds between calls of `lap`, and memory since `start`.

    The part "start" is all before the first: imports and loading.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}

    def start(self, name: str) -> None:
        self.parts.setdefault("start", Part([process_time()], _peak()))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.name, self.laps, self.since = name, [], process_time()

    def lap(self, count: int = 1) -> None:
        now = process_time()
        self.laps.append((now - self.since) / count)
        self.since = now

    def end(self) -> None:
        self.parts[self.name] = Part(self.laps[1:] or self.laps, _peak())


def _peak() -> float:
    """The most resident memory, in MB, since the process began or `clear_refs` was written."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1000


def measure_theirs(checkout: Path, model: Path, pictures: int, steps: int) -> Meter:
    """Their `main`, whole, and their pipeline as their evaluation calls it."""
    import torch
    from faithfulness_diffusers import copy_diffusers
    from faithfulness_steps import PROMPTS

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = copy_diffusers(checkout, folder)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        meter, plain = Meter(), train.tqdm

        class Timed(plain):
            """Their progress bars: a batch of pictures between two of the first, a step at each update of the second."""

            def __iter__(self):
                meter.start("anchor picture")
                for batch in super().__iter__():
                    yield batch
                    meter.lap(BATCH)
                meter.end()

            def update(self, n=1):
                if n and self.desc and self.desc.startswith("Steps"):
                    meter.start("step") if not self.n else meter.lap()
                    if self.n + n == self.total:
                        meter.end()
                return super().update(n)

        train.tqdm = Timed
        args = train.parse_args(_their_line(model, folder, pictures, steps))
        args.report_to = None
        train.main(args)
        pipeline = train.CustomDiffusionPipeline.from_pretrained(str(model), safety_checker=None)
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(42)
        meter.start("judged picture")
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(EVAL_BATCH)]
        options = {"num_inference_steps": EVAL_STEPS, "guidance_scale": 6.0, "eta": 1.0}
        for number, image in enumerate(pipeline(prompts, **options, generator=generator).images):
            image.save(folder / f"{number}.png")
        meter.lap(EVAL_BATCH)
        meter.end()
    return meter


def _their_line(model: Path, folder: Path, pictures: int, steps: int) -> list[str]:
    """Their README's command for an object, on one device and for a few pictures and steps."""
    options = {
        "pretrained_model_name_or_path": model,
        "output_dir": folder / "out",
        "class_data_dir": folder / "class",
        "class_prompt": folder / "prompts.txt",
        "caption_target": "cat+pouting cat",
        "concept_type": "object",
        "resolution": json.loads((model / "vae" / "config.json").read_text())["sample_size"],
        "num_class_images": pictures,
        "sample_batch_size": BATCH,
        "train_batch_size": BATCH,
        "learning_rate": 2e-6,
        "max_train_steps": steps,
        "parameter_group": "cross-attn",
        "dataloader_num_workers": 0,
    }
    return [
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
        "--scale_lr",
        "--hflip",
    ]


def measure_ours(model: Path, pictures: int, steps: int, defaults: bool) -> Meter:
    """The same by our functions; with `defaults` in our precision and batches, then as our config has it."""
    from faithfulness_steps import PROMPTS, SETTINGS

    from concept_ablation.common.image_store import read_store
    from concept_ablation.diffusion.pipeline import load_pipeline
    from concept_ablation.methods.ablation.data import AnchorData
    from concept_ablation.methods.ablation.training import Training

    pipeline = load_pipeline(model, device="cpu")
    precision, meter = "auto" if defaults else "fp32", Meter()
    sampler = {"guidance_scale": 6.0, "eta": 1.0, "precision": precision, "height": None, "width": None}
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "pictures.parquet"
        anchors = sampler | {"scheduler": "dpmsolver++", "steps": THEIR_STEPS}
        judged = sampler | {"scheduler": "ddim", "steps": EVAL_STEPS}
        batches = (OUR_BATCH, OUR_BATCH) if defaults else (BATCH, EVAL_BATCH)
        count = 2 * OUR_BATCH if defaults else pictures
        _draw(meter, "anchor picture", pipeline, store, anchors, batches[0], count)
        _draw(
            meter,
            "judged picture",
            pipeline,
            Path(name) / "judged.parquet",
            judged,
            batches[1],
            batches[1],
        )
        if defaults:
            quick = anchors | {"steps": OUR_STEPS, "eta": 0.0, "guidance_scale": 3.0}
            _draw(meter, "picture", pipeline, Path(name) / "quick.parquet", quick, OUR_BATCH, 3 * OUR_BATCH)
        data = AnchorData(list(read_store(store).images()), read_store(store).column("prompt"))
    targets = [(prompt.replace("cat", "pouting cat"),) for prompt in data.prompts]
    settings = replace(
        SETTINGS, steps=steps, learning_rate=2e-6, augmentation="diffusers", hflip=0.5, precision=precision
    )
    trainings = {"step": (settings, ())}
    if defaults:
        own = {
            "batch_size": OUR_BATCH,
            "augmentation": "compvis",
            "preserve": "null-space",
            "scale_lr": "none",
        }
        trainings["own step"] = (replace(settings, **own), PROMPTS)
    for name, (settings, preserved) in trainings.items():
        training = Training(pipeline, data, targets, settings, seed=0, preserved=preserved)
        meter.start(name)
        for _ in training:
            meter.lap()
        meter.end()
    return meter


def _draw(meter: Meter, name: str, pipeline, path: Path, sampler: Mapping, batch: int, count: int) -> None:
    """Draw `count` pictures into a store, and time each batch."""
    from faithfulness_steps import PROMPTS

    from concept_ablation.common.image_store import write_store
    from concept_ablation.diffusion.sampler import sample_images

    prompts, seeds = [PROMPTS[i % len(PROMPTS)] for i in range(count)], list(range(count))

    def rows() -> Iterator[dict]:
        images = sample_images(pipeline, prompts, seeds, sampler=sampler, batch_size=batch)
        for number, image in enumerate(images):
            yield {"image": image, "prompt": prompts[number], "seed": seeds[number], "index": number}
            if number % batch == batch - 1:
                meter.lap(batch)

    meter.start(name)
    write_store(path, rows(), {})
    meter.end()
