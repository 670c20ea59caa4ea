"""Stage `probe_wordings`: whether a row's target comes back when it is asked for in other words.

Each family of prompts is drawn twice from the same seeds, by the unchanged model and by the row's. These pictures report: no training
ever looks at them. docs/report.md defines the table.
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
from concept_ablation.common.image_store import read_store
from concept_ablation.diffusion.delta import apply_delta, sampling_of
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import load_model, write_images
from concept_ablation.evaluation.presence import PresenceJudge, family_line, numbered

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


def probe_wordings(
    spec: Mapping,
    delta: str | Path,
    pictures: Sequence[str | Path],
    control: str | Path,
    scores: str | Path,
    images: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Writes a line a family to `scores` (Parquet, columns `attack_table.COLUMNS`), and both models' pictures to `images`.

    In the image store a picture's role is the model, "base" or "ablated", and its subject the family.

    Args:
        spec: model, sampler, confidence, families, each: family, prompts (one a picture), seed (of the first; the next have the
            following ones); and what `PresenceJudge` takes.
        delta: the row's. pictures: image stores of the base model's pictures of each target; control: of the anchor.

    Raises:
        ModelError, DeltaError, SamplerError, DeviceError; FeatureError, MemorizationError, DetectorError.
    """
    pipeline = load_model(spec["model"], device)
    drawn = _drawn(pipeline, spec, delta, batch_size, Path(scores).stem)
    write_images(images, drawn, pipeline, spec, {})
    judge = PresenceJudge(
        spec, pick_device(device), [read_store(path) for path in pictures], read_store(control)
    )
    store = read_store(images)
    lines = []
    for asked in spec["families"]:
        family = asked["family"]
        seen = {side: judge.seen(store.select(side, family)) for side in ("base", "ablated")}
        lines.append(family_line(family, seen, spec["confidence"], len(spec["families"])))
        log.info(
            "%s: target seen in %.0f %%, before %.0f %%",
            family,
            100 * lines[-1]["ablated"],
            100 * lines[-1]["base"],
        )
    with atomic_output(scores) as path:
        pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), path)


def _drawn(
    pipeline: DiffusionPipeline, spec: Mapping, delta: str | Path, batch_size: int, label: str
) -> Iterator[dict]:
    """All families' pictures by the unchanged model, then by the row's."""
    for side in ("base", "ablated"):
        extra = sampling_of(apply_delta(pipeline, delta)) if side == "ablated" else {}
        rows = [
            row
            for asked in spec["families"]
            for row in numbered(asked["prompts"], asked["seed"], side, asked["family"])
        ]
        prompts, seeds = ([row[name] for row in rows] for name in ("prompt", "seed"))
        options = {
            "sampler": spec["sampler"],
            "batch_size": batch_size,
            "progress": f"{label}, {side}",
            **extra,
        }
        for row, image in zip(rows, sample_images(pipeline, prompts, seeds, **options), strict=True):
            yield {**row, "image": image}
