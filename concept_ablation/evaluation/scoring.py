"""Scores of one row: what the ablation did to the targets, to the anchor and to each neighbor.

The stage around `probes.score_probes`: it reads the images of every probe, computes their features a batch at a time
and writes the long table. docs/report.md defines every metric.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import ImageStore, read_store
from concept_ablation.common.roles import POOLS, probe_roles
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.image_models import ImageModels
from concept_ablation.evaluation.image_record import record_lines, write_record
from concept_ablation.evaluation.metrics.base import ImageMetric, PairMetric
from concept_ablation.evaluation.probes import score_probes
from concept_ablation.evaluation.row import Looks, Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.kinds.base import Kind
from concept_ablation.registries import KINDS, METRICS

log = logging.getLogger(__name__)


class ScoreError(UserError):
    """The images of a row can't be compared; the message names the file and what does not fit."""


def score_concept(
    spec: Mapping,
    samples: str | Path,
    base: Sequence[str | Path],
    scores: str | Path,
    images: str | Path | None = None,
    *,
    device: str = "auto",
    batch_size: int = 64,
) -> None:
    """Writes the long table of one row to `scores` (Parquet, columns `COLUMNS`), and to `images`, if given, a line a picture (`image_record`).

    Args:
        spec: concept, kind, targets, anchor, neighbors, texts (subject -> the text that the scorer compares with),
            scorer {model, pretrained}, statistics {bootstrap, confidence, seed}, samples (key of the images), base (subject -> key);
            for a kind with a memorized picture also image {file, sha256} and descriptor {model, sha256}, for one with a detector
            `detector` (see `detectors.load_detector`); where pictures were added until they were enough, `until` {look, looks (role ->
            the most looks)}.
        samples: image store of the ablated model, all probes.
        base: image stores of the base model, one a probe in the order of `roles.probe_roles`; of a longer one the first pictures count.
        device, batch_size: where, and how many images at once; neither changes a score.

    Raises:
        ScoreError: a probe is missing, or its prompts and seeds differ between base and ablated. MemorizationError: the
            memorized picture is not the planned one. FeatureError: the scorer or descriptor can't be loaded. DetectorError.
    """
    statistics, device = spec["statistics"], pick_device(device)
    scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), device)
    models = ImageModels(spec, scorer, device, batch_size)
    texts = dict(zip(spec["texts"], scorer.text_features(list(spec["texts"].values())), strict=True))
    probes = tuple(read_probes(spec, samples, base, models))
    subjects = tuple(spec["targets"]), spec["anchor"], tuple(spec["neighbors"])
    row = Row(KINDS[spec["kind"]], *subjects, texts, probes)
    bootstrap = Bootstrap(statistics["confidence"], statistics["bootstrap"], statistics["seed"])
    made = score_probes(row, bootstrap)
    names = {name: spec[name] for name in ("concept", "kind", "anchor")}
    names |= {"target": "; ".join(spec["targets"]), "features": scorer.name, "samples_key": spec["samples"]}
    lines = [names | line | _words(line, spec["texts"], models) for line in made]
    if images is not None:
        own = {name: names[name] for name in ("concept", "kind", "target")}
        keys = {probe.subject: Path(path).stem for probe, path in zip(probes, base, strict=True)}
        write_record(images, [own | line for line in record_lines(row, keys, spec["samples"])])
    with atomic_output(scores) as path:
        pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), path)
    log.info("%s: %d scores of %d probes", spec["concept"], len(made), len(probes))


def read_probes(
    spec: Mapping, samples_path: str | Path, base_paths: Sequence[str | Path], models: ImageModels
) -> Iterator[Probe]:
    """Features of every probe of a row, in the order of `roles.probe_roles`, and what its metrics read in the pictures."""
    samples = read_store(samples_path)
    for (role, subject), base_path in zip(probe_roles(spec), base_paths, strict=True):
        ablated, looks = samples.select(role, subject), None
        # The base model's store may be longer: another row's, or with `until` up to the last look.
        base = read_store(base_path).first(len(ablated))
        if "until" in spec:
            looks = Looks(-(-len(ablated) // spec["until"]["look"]), spec["until"]["looks"][role])
        check_same_seeds(base, ablated, subject)
        measured = read_pictures(KINDS[spec["kind"]], role, base, ablated, models)
        features = [
            models.scorer.image_features(side.images(), models.batch_size) for side in (base, ablated)
        ]
        seeds, prompts = (tuple(base.column(name)) for name in ("seed", "prompt"))
        places = tuple(samples.positions(role, subject))
        yield Probe(role, subject, *features, seeds, measured, prompts, places, looks)


def read_pictures(
    kind: Kind, role: str, base: ImageStore, ablated: ImageStore, models: ImageModels
) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
    """The metrics of pictures that a probe has: name -> (base (n,), ablated (n,)); base is None for a metric of pairs."""
    asked = [metric for metric in METRICS.values() if metric.applies(kind) and role in metric.roles]
    single = [metric for metric in asked if isinstance(metric, ImageMetric)]
    # Store by store, so that two metrics of one model can share what it sees in a store.
    sides = [[metric.read(store, models) for metric in single] for store in (base, ablated)]
    found = {metric.name: both for metric, *both in zip(single, *sides, strict=True)}
    pairs = {
        metric.name: (None, metric.read(base, ablated, models))
        for metric in asked
        if isinstance(metric, PairMetric)
    }
    return found | pairs


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


def _words(line: Mapping, texts: Mapping[str, str], models: ImageModels) -> dict[str, str]:
    """Unit, and what was compared: subjects spelled as the scorer read them, or the words of another model that judges."""
    metric = METRICS[line["metric"]]
    source = metric.source(models)
    if source is None:
        source = {
            name: "; ".join(texts.get(subject, subject) for subject in line[name].split("; "))
            for name in ("text", "against")
        }
    elif line["role"] in POOLS.values():
        source |= {"text": "", "against": ""}
    return {"unit": metric.unit} | source


def _identity(store: ImageStore) -> list[tuple[str, str, int]]:
    return list(zip(store.column("subject"), store.column("prompt"), store.column("seed"), strict=True))
