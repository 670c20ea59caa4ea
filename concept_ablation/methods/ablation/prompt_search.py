"""Memorized pictures: which prompts bring one back, found by drawing each and looking for copies.

A *target prompt* brings the picture back in most of its images, an *anchor prompt* says what the picture shows and
hardly ever does (Kumari et al., 2023). Which is which is never guessed from the words: the model draws a few
images of every candidate, and the copy descriptor decides.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import load_model
from concept_ablation.evaluation.memorized import CopyJudge, MemorizationError
from concept_ablation.prompts.stage import read_prompts

log = logging.getLogger(__name__)


RECORD = pa.schema(
    [
        ("prompt", pa.string()),
        ("caption", pa.bool_()),
        ("decision", pa.string()),
        ("copy_rate", pa.float64()),
        ("copies", pa.int64()),
        ("images", pa.int64()),
        ("mean_similarity", pa.float64()),
        ("max_similarity", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Trial:
    """One prompt that was tried. `caption`: it is one of the targets; `decision`: anchor, target or neither."""

    prompt: str
    caption: bool
    decision: str
    copy_rate: float
    copies: int
    images: int
    mean_similarity: float
    max_similarity: float


def search_prompts(
    spec: Mapping,
    prompts: str | Path,
    record: str | Path,
    *,
    candidates: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Stage `search_prompts`: find anchor and target prompts of a memorized picture.

    The captions (`targets`) are tried first, then `candidates` in their order, then the prompts of the JSON file
    `candidates`; `images` images each, image i with `seed` + i, until `anchors_wanted` and `targets_wanted`
    prompts are found or `budget` prompts were tried. A caption is never an anchor prompt. The file `prompts` gets `kind`,
    `anchor`, `prompts` (the anchor's) and `target_prompts`, both in the order in which they were found;
    `record` gets every prompt that was tried, also when this fails. Prompts after the last one that was needed
    aren't drawn, but for those that share its batch.

    Raises MemorizationError, FeatureError, SamplerError, DeviceError, ModelError.
    """
    if spec["anchor_max"] >= spec["target_min"]:
        raise MemorizationError(
            f"anchor_max {spec['anchor_max']} must be below target_min {spec['target_min']}"
        )
    possible = _in_order(spec, candidates)
    affordable = possible[: max(spec["budget"], len(spec["targets"]))]
    judge = CopyJudge(spec["image"], spec["descriptor"], pick_device(device))
    trials: list[Trial] = []
    try:
        for trial in _tried(affordable, judge, spec, device, batch_size, Path(prompts).stem):
            trials.append(trial)
            log.info("%s: %d of %d copies: %r", trial.decision, trial.copies, trial.images, trial.prompt)
            _check_captions(trials, spec, record)
            if _missing(trials, spec) == (0, 0):
                break
    finally:
        _write_record(record, trials, spec, judge)
    _check_found(trials, len(possible), spec, record)
    _write_found(prompts, trials, spec)


def _in_order(spec: Mapping, candidates_path: str | Path | None) -> list[str]:
    """All prompts that could be tried, none twice: the captions, then the candidates."""
    more = []
    if candidates_path is not None:
        more = read_prompts(candidates_path)["prompts"]
    return list(dict.fromkeys([*spec["targets"], *spec["candidates"], *more]))


def _tried(
    prompts: Sequence[str], judge: CopyJudge, spec: Mapping, device: str, batch_size: int, label: str
) -> Iterator[Trial]:
    """Try `prompts` one after the other; batches of images reach across them and are drawn when needed."""
    pipeline, count = load_model(spec["model"], device), spec["images"]
    drawn = sample_images(
        pipeline,
        [prompt for prompt in prompts for _ in range(count)],
        [spec["seed"] + index for _ in prompts for index in range(count)],
        sampler=spec["sampler"],
        batch_size=batch_size,
        progress=label,
    )
    with contextlib.closing(drawn):
        for prompt in prompts:
            similarity = judge.similarity(itertools.islice(drawn, count))
            yield _trial(prompt, similarity, int(np.sum(judge.is_copy(similarity))), spec)


def _trial(prompt: str, similarity: np.ndarray, copies: int, spec: Mapping) -> Trial:
    rate, caption, decision = copies / len(similarity), prompt in spec["targets"], "neither"
    if rate >= spec["target_min"]:
        decision = "target"
    elif rate <= spec["anchor_max"] and not caption:
        decision = "anchor"
    spread = float(similarity.mean()), float(similarity.max())
    return Trial(prompt, caption, decision, rate, copies, len(similarity), *spread)


def _missing(trials: Sequence[Trial], spec: Mapping) -> tuple[int, int]:
    """How many anchor and target prompts are still to be found."""
    found = [trial.decision for trial in trials]
    wanted = ("anchor", spec["anchors_wanted"]), ("target", spec["targets_wanted"])
    anchors, targets = (max(0, number - found.count(side)) for side, number in wanted)
    return anchors, targets


def _check_captions(trials: Sequence[Trial], spec: Mapping, record: str | Path) -> None:
    """Stop once all captions were tried, if none brings the picture back more often than an anchor prompt may."""
    if len(trials) != len(set(spec["targets"])):
        return
    best = max(trials, key=lambda trial: trial.copy_rate)
    if best.copy_rate <= spec["anchor_max"]:
        raise MemorizationError(
            f"{best.prompt!r} brings {spec['image']['file']} back in {best.copies} of {best.images} images: the model "
            f"hasn't memorized it, so there is nothing to remove. Check the row's target and image (record: {record})"
        )


def _check_found(trials: Sequence[Trial], candidates: int, spec: Mapping, record: str | Path) -> None:
    """Raise MemorizationError if prompts are missing: how many, and what would help."""
    missing = _missing(trials, spec)
    if missing == (0, 0):
        return
    found = [
        f"{spec[f'{side}s_wanted'] - gap} of {spec[f'{side}s_wanted']} {side} prompts"
        for side, gap in zip(("anchor", "target"), missing, strict=True)
    ]
    file = spec.get("file") or "the prompt file"
    more = (
        "all candidates were tried" if len(trials) == candidates else f"raise the budget ({spec['budget']})"
    )
    limits = [f"raise anchor_max ({spec['anchor_max']})"] if missing[0] else []
    limits += [f"lower target_min ({spec['target_min']})"] if missing[1] else []
    raise MemorizationError(
        f"found {' and '.join(found)} after {len(trials)} prompts (record: {record}): {more}, add prompts to {file}, ask "
        f"for fewer, or {' and '.join(limits)}"
    )


def _write_found(path: str | Path, trials: Sequence[Trial], spec: Mapping) -> None:
    anchors, targets = (
        [trial.prompt for trial in trials if trial.decision == side] for side in ("anchor", "target")
    )
    content = {"kind": spec["kind"], "anchor": spec["anchor"], "prompts": anchors, "target_prompts": targets}
    with atomic_output(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_record(path: str | Path, trials: Sequence[Trial], spec: Mapping, judge: CopyJudge) -> None:
    """Every prompt that was tried, in order; the spec and the descriptor are in the file's metadata."""
    settings = {**spec, "descriptor_name": judge.descriptor.name, "threshold": judge.descriptor.threshold}
    schema = RECORD.with_metadata({METADATA_KEY: json.dumps(settings, sort_keys=True)})
    with atomic_output(path) as part:
        pq.write_table(pa.Table.from_pylist([asdict(trial) for trial in trials], schema), part)
