"""Images for the evaluation, by the unchanged model (stage `sample_base`) and by the ablated one.

Stage `sample_ablated` is `evaluation.looks.sample_ablated`, which draws by the function of that name here where counts are fixed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from concept_ablation.common.hardware import resolve_precision
from concept_ablation.common.image_store import read_store, write_store
from concept_ablation.diffusion.delta import apply_delta, sampling_of
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.sampler import sample_images

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


def load_model(model: Mapping, device: str) -> DiffusionPipeline:
    """The pipeline that a spec's `model` names: `path`, `revision` and, if set, `config`, `trust_remote_code`."""
    return load_pipeline(
        model["path"],
        model["revision"],
        device,
        model.get("config"),
        trust_remote_code=model.get("trust_remote_code", False),
    )


def sample_base(
    spec: Mapping,
    images: str | Path,
    start: str | Path | None = None,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Stage `sample_base`: one probe's images by the unchanged model, without a role: rows share them.

    start: a store of its first images, which are taken from there if they were computed as they would be here. Raises StoreError.
    """
    pipeline, probes = load_model(spec["model"], device), [{"role": None, **spec["probe"]}]
    first = list(_first_images(start, spec, pipeline)) if start else []
    options = {"sampler": spec["sampler"], "batch_size": batch_size, "progress": Path(images).stem}
    drawn = draw_probes(pipeline, probes, slice(len(first), None), **options)
    write_images(images, itertools.chain(first, drawn), pipeline, spec, {"delta_metadata": None})


def _first_images(start: str | Path, spec: Mapping, pipeline: DiffusionPipeline) -> Iterator[dict]:
    """The rows of a store with their images; none if another device or precision made them."""
    store, precision = read_store(start), resolve_precision(spec["sampler"]["precision"], pipeline.device)
    if (store.metadata.get("device"), store.metadata.get("precision")) != (pipeline.device.type, precision):
        return
    log.info("the first %d images are those of %s", len(store), start)
    for row, image in zip(store.rows, store.images(), strict=True):
        yield {**row, "image": image}


def sample_ablated(
    spec: Mapping, delta: str | Path, images: str | Path, *, device: str = "auto", batch_size: int = 16
) -> None:
    """All probes of a row by the model with its delta, one after the other."""
    _sample_probes(spec, spec["probes"], images, delta_path=delta, device=device, batch_size=batch_size)


def _sample_probes(
    spec: Mapping,
    probes: Sequence[Mapping],
    out_path: str | Path,
    *,
    delta_path: str | Path | None = None,
    device: str,
    batch_size: int,
) -> None:
    """Sample `probes` into one store, by the unchanged model or with its delta."""
    pipeline = load_model(spec["model"], device)
    delta = None if delta_path is None else apply_delta(pipeline, delta_path)
    options = {"sampler": spec["sampler"], "batch_size": batch_size, **sampling_of(delta or {})}
    rows = draw_probes(pipeline, probes, progress=Path(out_path).stem, **options)
    write_images(out_path, rows, pipeline, spec, {"delta_metadata": delta})


def draw_probes(
    pipeline: DiffusionPipeline, probes: Sequence[Mapping], numbers: slice = slice(None), **options
) -> Iterator[dict]:
    """Rows with images; image i of a probe has prompt i (modulo their number), seed + i. `options`: sample_images'.

    numbers: which of each probe's images; all, if nothing else is said.
    """
    rows = list(_probe_rows(probes, numbers))
    images = sample_images(
        pipeline, [row["prompt"] for row in rows], [row["seed"] for row in rows], **options
    )
    for row, image in zip(rows, images, strict=True):
        yield {**row, "image": image}


def write_images(
    path: str | Path, rows: Iterable[dict], pipeline: DiffusionPipeline, spec: Mapping, extra: Mapping
) -> None:
    """Write a store whose metadata is the spec, `extra`, and what the images were computed on."""
    precision = resolve_precision(spec["sampler"]["precision"], pipeline.device)
    metadata = {**spec, "device": pipeline.device.type, "precision": precision, **extra}
    count = write_store(path, rows, metadata)
    log.info("wrote %d images to %s (%s, %s)", count, path, pipeline.device, precision)


def _probe_rows(probes: Sequence[Mapping], numbers: slice) -> Iterator[dict]:
    for probe in probes:
        for index in range(probe["images"])[numbers]:
            prompt = probe["prompts"][index % len(probe["prompts"])]
            named = {"role": probe["role"], "subject": probe["subject"]}
            yield {"prompt": prompt, "seed": probe["seed"] + index, "index": index, **named}
