"""Scores of one row: what the ablation did to the targets, to the anchor and to each neighbor.

The stage around `probes.score_probes`: it reads the images of every probe, computes their features a batch at a time
and writes the long table. docs/report.md defines every metric.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import ImageStore, open_picture, read_store
from concept_ablation.common.roles import POOLS, probe_roles
from concept_ablation.common.score_table import COLUMNS, UNITS
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.copies import CopyDescriptor
from concept_ablation.evaluation.detectors import Detector, load_detector
from concept_ablation.evaluation.probes import Bootstrap, Probe, Subjects, score_probes
from concept_ablation.registries import KINDS

log = logging.getLogger(__name__)


class ScoreError(UserError):
    """The images of a row can't be compared; the message names the file and what does not fit."""


class Judge(Protocol):
    """What a kind needs besides CLIP: metrics that it gives, each a number an image, and how the table names them."""

    name: str
    words: Mapping[str, str]
    metrics: tuple[str, ...]

    def __call__(self, store: ImageStore, batch_size: int) -> tuple[np.ndarray, ...]:
        """One (n,) array for each of `metrics`."""


def score_concept(
    spec: Mapping,
    samples: str | Path,
    base: Mapping[str, str | Path] | Sequence[str | Path],
    scores: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 64,
) -> None:
    """Writes the long table of one row to `scores` (Parquet, columns `COLUMNS`).

    Args:
        spec: concept, kind, targets, anchor, neighbors, texts (subject -> the text that the scorer compares with),
            scorer {model, pretrained}, statistics {bootstrap, confidence, seed}, samples (key of the images); for kind
            memorization also image {file, sha256} and descriptor {model, sha256}, for nudity and inappropriate detector
            (see `detectors.load_detector`).
        samples: image store of the ablated model, all probes.
        base: subject -> image store of the base model; or these stores in the order targets, anchor, neighbors.
        device, batch_size: where, and how many images at once; neither changes a score.

    Raises:
        ScoreError: a probe is missing, its prompts and seeds differ between base and ablated, or the memorized picture
            is not the planned one. FeatureError: the scorer or descriptor can't be loaded. DetectorError.
    """
    statistics, device = spec["statistics"], pick_device(device)
    scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), device)
    judge = load_judge(spec, scorer, device)
    subjects = Subjects(
        tuple(spec["targets"]),
        spec["anchor"],
        tuple(spec["neighbors"]),
        style=KINDS[spec["kind"]].limit_above_neutral,
    )
    if not isinstance(base, Mapping):
        base = dict(zip([subject for _, subject in probe_roles(spec)], base, strict=True))
    texts = dict(zip(spec["texts"], scorer.text_features(list(spec["texts"].values())), strict=True))
    probes = list(read_probes(spec, samples, base, scorer, judge, batch_size))
    bootstrap = Bootstrap(statistics["confidence"], statistics["bootstrap"], statistics["seed"])
    rows = score_probes(probes, texts, subjects, bootstrap)
    names = {name: spec[name] for name in ("concept", "kind", "anchor")}
    names |= {"target": "; ".join(spec["targets"]), "features": scorer.name, "key": spec["samples"]}
    lines = [names | row | _words(row, spec["texts"], judge) for row in rows]
    with atomic_output(scores) as path:
        pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), path)
    log.info("%s: %d scores of %d probes", spec["concept"], len(rows), len(probes))


def read_probes(
    spec: Mapping,
    samples_path: str | Path,
    base_paths: Mapping[str, str | Path],
    scorer: ClipScorer,
    judge: Judge | None,
    batch_size: int,
) -> Iterator[Probe]:
    """Features of every probe of a row: the targets, the anchor, then the neighbors in their order."""
    samples = read_store(samples_path)
    for role, subject in probe_roles(spec):
        base, ablated = read_store(base_paths[subject]), samples.select(role, subject)
        check_same_seeds(base, ablated, subject)
        measured = {}
        if judge:
            sides = [judge(store, batch_size) for store in (base, ablated)]
            measured = dict(zip(judge.metrics, zip(*sides, strict=True), strict=True))
        yield Probe(
            role,
            subject,
            scorer.image_features(base.images(), batch_size),
            scorer.image_features(ablated.images(), batch_size),
            tuple(base.column("seed")),
            measured,
        )


def check_same_seeds(base: ImageStore, ablated: ImageStore, subject: str) -> None:
    """Raises ScoreError, naming both files, unless the two hold the same prompts and seeds of `subject`, image by image."""
    theirs, ours = _identity(base), _identity(ablated)
    if not ours:
        raise ScoreError(f"{ablated.path}: no images of {subject!r}; delete the file and run again")
    if ours != theirs:
        raise ScoreError(
            f"{subject!r}: the {len(ours)} images in {ablated.path} and the {len(theirs)} in {base.path} were not made with the "
            "same prompts and seeds, so they can't be compared; delete both files and run again"
        )


def load_judge(spec: Mapping, scorer: ClipScorer, device: str) -> Judge | None:
    """What the row's kind needs besides the scorer: copies for memorization, a detector for unwanted content."""
    if spec["kind"] == "memorization":
        descriptor = CopyDescriptor(
            spec["descriptor"]["model"], device, sha256=spec["descriptor"].get("sha256")
        )
        return Copies(descriptor, read_image(spec["image"]["file"], spec["image"]["sha256"]))
    if "detector" in spec:
        return Detections(load_detector(spec["detector"], scorer, device))
    return None


class Copies:
    """Which images are copies of one picture, and how much they resemble it (cosine of the descriptors)."""

    metrics = ("copy_rate", "copy_similarity")

    def __init__(self, descriptor: CopyDescriptor, picture: Image.Image):
        self.descriptor, self.name = descriptor, descriptor.name
        self.picture = descriptor.features([picture])[0]
        self.words = {"text": "", "against": "the memorized picture"}

    def __call__(self, store: ImageStore, batch_size: int) -> tuple[np.ndarray, ...]:
        similarity = self.descriptor.features(store.images(), batch_size) @ self.picture
        return np.asarray(self.descriptor.is_copy(similarity), dtype=np.float64), similarity


class Detections:
    """Which images a detector flags."""

    metrics = ("detected",)

    def __init__(self, detector: Detector):
        self.detector, self.name = detector, detector.name
        self.words = {"text": detector.text, "against": detector.against}

    def __call__(self, store: ImageStore, batch_size: int) -> tuple[np.ndarray, ...]:
        return (self.detector.detect(store.images(), batch_size),)


def read_image(path: str | Path, sha256: str) -> Image.Image:
    """The picture at `path`, which must still be the planned one. Raises ScoreError."""
    try:
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
            raise ScoreError(f"{path}: was changed after this run was planned; start it again")
        return open_picture(path)
    except OSError as error:
        raise ScoreError(f"{path}: the memorized picture can't be read ({error})") from error


def _words(row: Mapping, texts: Mapping[str, str], judge: Judge | None) -> dict[str, str]:
    """Unit, and what was compared: subjects spelled as the scorer read them, or the judge's own words."""
    unit = {"unit": UNITS[row["metric"]]}
    if judge and row["metric"] in judge.metrics:
        pooled = row["role"] in POOLS.values()
        return unit | {"features": judge.name} | (dict.fromkeys(judge.words, "") if pooled else judge.words)
    return unit | {
        name: "; ".join(texts.get(subject, subject) for subject in row[name].split("; "))
        for name in ("text", "against")
    }


def _identity(store: ImageStore) -> list[tuple[str, str, int]]:
    return list(zip(store.column("subject"), store.column("prompt"), store.column("seed"), strict=True))
