"""Scores of one row: what the ablation did to the target, to the anchor and to each neighbor.

Every probe (the images of one subject) exists twice, made with the same prompts and seeds by the base and by the
ablated model. `score_probes` is the mathematics, on features; `score_concept` is the stage: it reads the images,
computes their features a batch at a time and writes the long table. docs/report.md defines every metric.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation import metrics
from concept_ablation.features import ClipScorer
from concept_ablation.imagestore import ImageStore, read_store
from concept_ablation.metrics import Estimate
from concept_ablation.runtime import atomic_output, pick_device
from concept_ablation.tables import COLUMNS, POOLED, SHARES, UNITS

log = logging.getLogger(__name__)


class ScoreError(ValueError):
    """The images of a row can't be compared; the message names the file and what does not fit."""


@dataclass(frozen=True)
class Probe:
    """Image features of one subject, row i of both made with the same prompt and seed. Rows have length 1.

    role: "target", "anchor" or "neighbor"; base, ablated: (n, d).
    """

    role: str
    subject: str
    base: np.ndarray
    ablated: np.ndarray


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their level, the number of draws, and the seed of the draws."""

    confidence: float = 0.95
    draws: int = 1000
    seed: int = 0


def score_concept(
    spec: Mapping,
    samples_path: str | Path,
    base_paths: Mapping[str, str | Path] | Sequence[str | Path],
    out_path: str | Path,
    runtime: Mapping | None = None,
) -> None:
    """Writes the long table of one row to `out_path` (Parquet, columns `COLUMNS`).

    Args:
        spec: concept, kind, target, anchor, neighbors, texts (subject -> the text that the scorer compares with),
            scorer {model, pretrained}, statistics {bootstrap, confidence, seed}, samples (key of the images).
        samples_path: image store of the ablated model, all probes.
        base_paths: subject -> image store of the base model; or these stores in the order target, anchor, neighbors.
        runtime: device ("auto"), score_batch_size (64); neither changes a score.

    Raises:
        ScoreError: a probe is missing, or its prompts and seeds differ between base and ablated.
        FeatureError: the scorer can't be loaded.
    """
    runtime, statistics = runtime or {}, spec["statistics"]
    scorer = ClipScorer(
        spec["scorer"]["model"], spec["scorer"].get("pretrained"), pick_device(runtime.get("device", "auto"))
    )
    if not isinstance(base_paths, Mapping):
        base_paths = dict(zip([spec["target"], spec["anchor"], *spec["neighbors"]], base_paths, strict=True))
    texts = dict(zip(spec["texts"], scorer.text_features(list(spec["texts"].values())), strict=True))
    probes = list(read_probes(spec, samples_path, base_paths, scorer, runtime.get("score_batch_size", 64)))
    bootstrap = Bootstrap(statistics["confidence"], statistics["bootstrap"], statistics["seed"])
    names = {name: spec[name] for name in ("concept", "kind", "target", "anchor")}
    names |= {"features": scorer.name, "key": spec["samples"]}
    rows = score_probes(probes, texts, spec["target"], spec["anchor"], bootstrap)
    table = pa.Table.from_pylist([names | row | _words(row, spec["texts"]) for row in rows], schema=COLUMNS)
    with atomic_output(out_path) as path:
        pq.write_table(table, path)
    log.info("%s: %d scores of %d probes", spec["concept"], len(rows), len(probes))


def read_probes(
    spec: Mapping,
    samples_path: str | Path,
    base_paths: Mapping[str, str | Path],
    scorer: ClipScorer,
    batch_size: int,
) -> Iterator[Probe]:
    """Features of every probe of a row: target, anchor, then the neighbors in their order."""
    samples = read_store(samples_path)
    wanted = [("target", spec["target"]), ("anchor", spec["anchor"])]
    for role, subject in wanted + [("neighbor", neighbor) for neighbor in spec["neighbors"]]:
        base, ablated = read_store(base_paths[subject]), samples.select(role, subject)
        check_same_seeds(base, ablated, subject)
        yield Probe(
            role,
            subject,
            scorer.image_features(base.images(), batch_size),
            scorer.image_features(ablated.images(), batch_size),
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


def score_probes(
    probes: Sequence[Probe], texts: Mapping[str, np.ndarray], target: str, anchor: str, bootstrap: Bootstrap
) -> list[dict]:
    """The long table's rows, without the row's names: role, probe, model, metric, value, interval, n, text, against.

    Args:
        probes: one a subject.
        texts: subject -> (d,) text feature, for every probe's subject, the target and the anchor.
    """
    _warn_of_equal_texts(texts)
    per_image = [_per_image(probe, probes, texts, target, anchor) for probe in probes]
    rows = [
        row
        for probe, values in zip(probes, per_image, strict=True)
        for row in _summarise([probe], [values], probe.role, probe.subject, bootstrap)
    ]
    neighbors = [index for index, probe in enumerate(probes) if probe.role == "neighbor"]
    if neighbors:
        chosen = [probes[i] for i in neighbors], [per_image[i] for i in neighbors]
        rows += _summarise(*chosen, POOLED, POOLED, bootstrap)
    return rows


@dataclass(frozen=True)
class _Values:
    """One metric of one probe, an image a number: (n,) for the base and the ablated model (base None: no such value)."""

    base: np.ndarray | None
    ablated: np.ndarray
    text: str
    against: str


def _per_image(
    probe: Probe, probes: Sequence[Probe], texts: Mapping[str, np.ndarray], target: str, anchor: str
) -> dict[str, _Values]:
    own = target if probe.role == "anchor" else probe.subject
    pair = np.stack([texts[own], texts[anchor]])
    sides = (probe.base, probe.ablated)
    cosines = [metrics.cosine(side, texts[probe.subject]) for side in sides]
    values = {"clip_accuracy": _Values(*(metrics.recognised(side, pair, 0) for side in sides), own, anchor)}
    if probe.role != "anchor":
        # The anchor is a wider word for the target and for most neighbors ("cat"): no rival of theirs.
        subjects = [other.subject for other in probes if other.role != "anchor"]
        known = np.stack([texts[subject] for subject in subjects])
        shares = (metrics.recognised(side, known, subjects.index(own)) for side in sides)
        values["recognition"] = _Values(
            *shares, own, "; ".join(subject for subject in subjects if subject != own)
        )
    values["clip_cosine"] = _Values(*cosines, probe.subject, "")
    values["clip_score_2_5"] = _Values(*(metrics.clip_score(side) for side in cosines), probe.subject, "")
    twins = np.sum(np.asarray(probe.base, dtype=np.float64) * probe.ablated, axis=1)
    values["image_similarity"] = _Values(None, twins, "", "base model, same seed")
    return values


def _summarise(
    probes: Sequence[Probe], values: Sequence[dict[str, _Values]], role: str, name: str, bootstrap: Bootstrap
) -> list[dict]:
    """Rows of one probe, or of several pooled: base, ablated and their difference for each metric."""
    groups = np.repeat(np.arange(len(probes)), [len(probe.base) for probe in probes])
    options = {"confidence": bootstrap.confidence, "draws": bootstrap.draws, "seed": bootstrap.seed}
    rows = []
    for metric in values[0]:
        first = values[0][metric]
        ablated = np.concatenate([value[metric].ablated for value in values])
        base = None if first.base is None else np.concatenate([value[metric].base for value in values])
        words = (
            {"text": first.text, "against": first.against}
            if len(probes) == 1
            else {"text": "", "against": ""}
        )
        place = {"probe": name, "role": role, "metric": metric} | words
        for model, estimate in _estimates(metric in SHARES, base, ablated, groups, options).items():
            rows.append(place | {"model": model} | _fields(estimate))
    kid = metrics.kid_estimate([(probe.ablated, probe.base) for probe in probes], **options)
    scaled = Estimate(1000 * kid.value, 1000 * kid.low, 1000 * kid.high, kid.n, kid.interval)
    place = {
        "probe": name,
        "role": role,
        "metric": "kid_x1000",
        "text": "",
        "against": "base model, same prompts",
    }
    return rows + [place | {"model": "ablated"} | _fields(scaled)]


def _estimates(
    share: bool, base: np.ndarray | None, ablated: np.ndarray, groups: np.ndarray, options: dict
) -> dict[str, Estimate]:
    if share:
        level = {"confidence": options["confidence"]}
        return {
            "base": metrics.proportion(base, **level),
            "ablated": metrics.proportion(ablated, **level),
            "difference": metrics.paired_proportion_difference(ablated, base, **level),
        }
    if base is None:
        return {"ablated": metrics.mean(ablated, groups=groups, **options)}
    return {
        "base": metrics.mean(base, groups=groups, **options),
        "ablated": metrics.mean(ablated, groups=groups, **options),
        "difference": metrics.paired_difference(ablated, base, groups=groups, **options),
    }


def _fields(estimate: Estimate) -> dict:
    return {
        "value": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "n": estimate.n,
        "interval": estimate.interval,
    }


def _words(row: Mapping, texts: Mapping[str, str]) -> dict[str, str]:
    """Unit, and the subjects of a row spelled as the scorer read them."""
    against = "; ".join(texts.get(subject, subject) for subject in row["against"].split("; "))
    return {"unit": UNITS[row["metric"]], "text": texts.get(row["text"], row["text"]), "against": against}


def _identity(store: ImageStore) -> list[tuple[str, str, int]]:
    return list(zip(store.column("subject"), store.column("prompt"), store.column("seed"), strict=True))


def _warn_of_equal_texts(texts: Mapping[str, np.ndarray]) -> None:
    names = list(texts)
    for i, first in enumerate(names):
        for second in names[:i]:
            if metrics.cosine(texts[first][None], texts[second])[0] > 1 - metrics.TIE:
                log.warning(
                    "the scorer reads %r and %r as the same text: no score can tell them apart", second, first
                )
