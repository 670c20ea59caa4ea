"""Stage `measure_interference`: what a row's model does to subjects of other rows.

Each is drawn with the prompts, seeds and sampler of the base model's pictures of it, which are there already, and both are compared seed
by seed. What the row draws itself is taken from its own pictures. docs/report.md defines the table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import ImageStore, read_store, write_store
from concept_ablation.common.interference_table import COLUMNS, DRAWN, MEASURES
from concept_ablation.diffusion.delta import apply_delta, sampling_of
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import load_model, write_images
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.scoring import check_same_seeds
from concept_ablation.evaluation.statistics import Bootstrap, paired_loss
from concept_ablation.kinds.base import Kind
from concept_ablation.registries import METRICS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


def measure_interference(
    spec: Mapping,
    delta: str | Path,
    base: Sequence[str | Path],
    scores: str | Path,
    images: str | Path,
    *,
    samples: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Writes a line a victim to `scores` (Parquet, columns `COLUMNS`), and the pictures that were drawn for it to `images`.

    Args:
        spec: model, scorer {model, pretrained}, statistics {bootstrap, confidence, seed}, and victims, each: subject, texts
            (subject -> text; it is recognised among these), images (the number that is compared), probed (role and subject in
            `samples`, or None).
        delta: the row's.
        base: image stores of the base model, one a victim.
        samples: the row's own pictures; needed where a victim is probed.

    Raises:
        ScoreError: prompts or seeds of a victim's own pictures differ from the base model's. FeatureError: no scorer.
    """
    victims = spec["victims"]
    before = [read_store(path).first(victim["images"]) for path, victim in zip(base, victims, strict=True)]
    wanted = {place: store for place, store in enumerate(before) if not victims[place]["probed"]}
    _draw(spec, wanted, delta, images, device, batch_size)
    own, drawn = read_store(samples) if samples else None, read_store(images)
    scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), pick_device(device))
    lines = []
    for place, (victim, store) in enumerate(zip(victims, before, strict=True)):
        after = own.select(*victim["probed"]) if victim["probed"] else drawn.select(DRAWN.format(place))
        after = after.first(victim["images"])
        check_same_seeds(store, after, victim["subject"])
        features = [scorer.image_features(side.images()) for side in (store, after)]
        texts = dict(zip(victim["texts"], scorer.text_features(list(victim["texts"].values())), strict=True))
        lines.append(compare_victim(victim["subject"], *features, texts, Bootstrap(**_drawing(spec))))
    with atomic_output(scores) as path:
        pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), path)
    log.info("%d victims, %d of them drawn", len(lines), len(wanted))


def compare_victim(
    subject: str, base: np.ndarray, ablated: np.ndarray, texts: Mapping[str, np.ndarray], bootstrap: Bootstrap
) -> dict:
    """One line of the table, from image features (n, d), whose row i has one seed in both, and text features (d,) by subject.

    `p`: the chance of so large a loss of recognition or of typical images, if the ablation changed nothing; it is twice the smaller
    of the two (Bonferroni), at most 1.
    """
    row = Row(Kind(), (), "", tuple(texts), texts, [Probe("neighbor", subject, base, ablated)])
    line: dict[str, object] = {"victim": subject, "n": len(base)}
    for name in MEASURES:
        values = METRICS[name].values(row.probes[0], row)
        made = METRICS[name].estimates([values], bootstrap)
        line |= {f"{name}_{model}": made[model].value for model in ("base", "ablated")}
        change = made["difference"]
        line |= {f"{name}_change": change.value, f"{name}_low": change.low, f"{name}_high": change.high}
        line[f"{name}_p"] = paired_loss(values.ablated, values.base)
    return line | {"p": min(1.0, len(MEASURES) * min(line[f"{name}_p"] for name in MEASURES))}


def _drawing(spec: Mapping) -> dict:
    statistics = spec["statistics"]
    return {
        "confidence": statistics["confidence"],
        "draws": statistics["bootstrap"],
        "seed": statistics["seed"],
    }


def _draw(
    spec: Mapping,
    wanted: Mapping[int, ImageStore],
    delta: str | Path,
    out_path: str | Path,
    device: str,
    batch_size: int,
) -> None:
    """Draw the pictures of `wanted`, base stores by their place in the spec, once more by the row's model."""
    if not wanted:  # all victims are in the row's own pictures
        write_store(out_path, [], spec)
        return
    pipeline = load_model(spec["model"], device)
    applied = apply_delta(pipeline, delta)
    sampler = next(iter(wanted.values())).metadata["sampler"]
    rows = _pictures(pipeline, wanted, {"batch_size": batch_size, **sampling_of(applied)})
    write_images(out_path, rows, pipeline, {**spec, "sampler": sampler}, {"delta_metadata": applied})


def _pictures(
    pipeline: DiffusionPipeline, wanted: Mapping[int, ImageStore], options: Mapping
) -> Iterator[dict]:
    for place, store in wanted.items():
        drawn = sample_images(
            pipeline,
            store.column("prompt"),
            store.column("seed"),
            sampler=store.metadata["sampler"],
            **options,
            progress=store.rows[0]["subject"],
        )
        for row, image in zip(store.rows, drawn, strict=True):
            yield {**row, "role": DRAWN.format(place), "image": image}
