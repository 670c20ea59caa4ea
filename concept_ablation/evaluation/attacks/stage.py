"""Stage `attack_concept`: an attack that is learned against one row's model, and its replay against another one.

The attack aims at the base model's own pictures of the target, those that the report compares with. It is judged by other pictures,
from fresh seeds, by the row's own measure. docs/report.md says what the control is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.attack_table import COLUMNS
from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import Pictures, read_store, write_store
from concept_ablation.diffusion.delta import apply_delta, sampling_of
from concept_ablation.diffusion.placeholders import add_placeholders, filled, placed
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import load_model, write_images
from concept_ablation.evaluation.attacks.base import Attack, Goal, Learned, load_learned, save_learned
from concept_ablation.evaluation.presence import PresenceJudge, family_line, numbered
from concept_ablation.registries import ATTACKS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


def attack_concept(
    spec: Mapping,
    delta: str | Path,
    pictures: Sequence[str | Path],
    control: str | Path,
    scores: str | Path,
    images: str | Path,
    learned: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Writes one line to `scores` (columns `attack_table.COLUMNS`), its pictures to `images`, what was learned to `learned`.

    In the image store a picture's role is "base" (the unchanged model, asked plainly), "ablated" (the row's model under attack) or
    "control" (the unchanged model under an attack that aims at the anchor's pictures), and its subject the attack.

    Args:
        spec: model, sampler, confidence, attack, settings (tokens, steps, batch_size, learning_rate, seed), aims: "ablated" and
            "control", each: start (the words that are attacked), prompts (a list for each of its stores, with `roles.MARK`, prompt i
            for picture i, in turn); plain (for each target the prompts that ask for it), images (how many are judged), seed (of
            the first); and what `PresenceJudge` takes.
        delta: the row's. pictures: image stores of the base model's pictures of each target; control: of the anchor.

    Raises:
        AttackError; ModelError, DeltaError, SamplerError, DeviceError; FeatureError, MemorizationError, DetectorError.
    """
    judge = PresenceJudge(
        spec, pick_device(device), [read_store(path) for path in pictures], read_store(control)
    )
    attack, pipeline = ATTACKS[spec["attack"]], load_model(spec["model"], device)
    asked = {"sampler": spec["sampler"], "batch_size": batch_size}

    def all_pictures() -> Iterator[dict]:
        yield from _draw(pipeline, spec, "base", spec["plain"], None, asked)
        yield from _attack(pipeline, spec, "control", [control], attack, asked)
        drawn = asked | sampling_of(apply_delta(pipeline, delta))
        yield from _attack(pipeline, spec, "ablated", pictures, attack, drawn, learned, judge.floors)

    write_images(images, all_pictures(), pipeline, spec, {})
    store = read_store(images)
    seen = {side: judge.seen(store.select(side)) for side in ("base", "ablated", "control")}
    words = load_learned(learned)[0].words
    more = {"budget": attack.budget(spec["settings"]), "learned": words}
    line = family_line(attack.name, seen, spec["confidence"], **more)
    with atomic_output(scores) as path:
        pq.write_table(pa.Table.from_pylist([line], schema=COLUMNS), path)
    log.info("%s: target seen in %.0f %%", attack.name, 100 * line["ablated"])


def replay(
    learned: str | Path,
    delta: str | Path | None,
    images: str | Path | None = None,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> dict:
    """What an attack learned, tried on another model: the line of the table, with `base` and `control` left out.

    delta: of the model; None: the unchanged one. images: where its pictures go; None: they aren't kept.
    Raises what `attack_concept` raises.
    """
    found, spec = load_learned(learned)
    pipeline = load_model(spec["model"], device)
    extra = sampling_of(apply_delta(pipeline, delta)) if delta is not None else {}
    found = Learned({name: rows.to(pipeline.device) for name, rows in found.rows.items()}, found.words)
    asked = {"sampler": spec["sampler"], "batch_size": batch_size, **extra}
    drawn = list(_draw(pipeline, spec, "ablated", spec["aims"]["ablated"]["prompts"], found, asked))
    if images is not None:
        write_store(images, drawn, spec)
    judge = PresenceJudge(spec, pick_device(device))
    pictures = Pictures(row["image"] for row in drawn)
    more = {"budget": ATTACKS[spec["attack"]].budget(spec["settings"]), "learned": found.words}
    return family_line(spec["attack"], {"ablated": judge.seen(pictures)}, spec["confidence"], **more)


def _attack(
    pipeline: DiffusionPipeline,
    spec: Mapping,
    side: str,
    stores: Sequence[str | Path],
    attack: Attack,
    asked: Mapping,
    out_path: str | Path | None = None,
    floors: Mapping[str, float] | None = None,
) -> Iterator[dict]:
    """Learn the attack against the pipeline as it is, save it to `out_path` with the judge's floors, and draw with it."""
    aim = spec["aims"][side]
    learned = attack.learn(goal_of(pipeline, spec, side, stores), aim["start"], spec["settings"])
    if out_path is not None:
        save_learned(out_path, learned, {**spec, "floors": floors})
    yield from _draw(pipeline, spec, side, aim["prompts"], learned, asked)


def goal_of(pipeline: DiffusionPipeline, spec: Mapping, side: str, stores: Sequence[str | Path]) -> Goal:
    """What the attack of a spec, as for `attack_concept`, aims at: the stores' pictures, each by its own prompt. Raises StoreError."""
    pictures, prompts = [], []
    for path, own in zip(stores, spec["aims"][side]["prompts"], strict=True):
        images = list(read_store(path).images())
        pictures += images
        prompts += [own[place % len(own)] for place in range(len(images))]
    return Goal(pipeline, pictures, prompts, spec["sampler"]["precision"], spec["settings"]["seed"])


def _draw(
    pipeline: DiffusionPipeline,
    spec: Mapping,
    side: str,
    prompts: Sequence[Sequence[str]],
    learned: Learned | None,
    asked: Mapping,
) -> Iterator[dict]:
    """The judged pictures of one side, from the same fresh seeds on all sides. prompts: lists that take turns."""
    lists = [prompts[place % len(prompts)] for place in range(spec["images"])]
    turns = [own[place // len(prompts) % len(own)] for place, own in enumerate(lists)]
    soft = learned is not None and learned.words is None
    if learned is not None:
        text = add_placeholders(pipeline, spec["settings"]["tokens"]) if soft else learned.words
        turns = [placed(prompt, text) for prompt in turns]
    rows = numbered(turns, spec["seed"], side, spec["attack"])
    seeds = [row["seed"] for row in rows]
    with filled(pipeline, learned.rows if soft else {}):
        drawn = sample_images(pipeline, turns, seeds, progress=f"{spec['attack']}, {side}", **asked)
        for row, image in zip(rows, drawn, strict=True):
            yield {**row, "image": image}
