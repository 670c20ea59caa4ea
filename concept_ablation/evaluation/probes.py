"""The scores of a row's probes: mathematics on features, no files and no models.

A probe is the images of one subject, made twice with the same prompts and seeds, by the base and by the ablated model.
`score_probes` gives the rows of the long table; docs/report.md defines every metric.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from concept_ablation.common.roles import PARAPHRASES, POOLS, WORST
from concept_ablation.common.score_table import SHARES
from concept_ablation.evaluation import statistics as metrics
from concept_ablation.evaluation.statistics import Estimate
from concept_ablation.evaluation.typicality import NearestNeighbors, typical_change

log = logging.getLogger(__name__)

TWIN, SAME_PROMPTS, OTHER_SEEDS = (
    f"base model, {which}" for which in ("same seed", "same prompts", "other seeds")
)
"""What image_similarity, KID and typical compare with, as the table says it."""


@dataclass(frozen=True)
class Probe:
    """Image features of one subject, row i of both made with the same prompt and seed. Rows have length 1.

    role: "target", "paraphrase", "anchor" or "neighbor"; base, ablated: (n, d).
    seeds: (n,) the images' seeds; empty: not known.
    measured: further metrics that need more than features (copies, detections): name -> (base (n,), ablated (n,)).
    """

    role: str
    subject: str
    base: np.ndarray
    ablated: np.ndarray
    seeds: tuple[int, ...] = ()
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their level, the number of draws, and the seed of the draws."""

    confidence: float = 0.95
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Subjects:
    """A row's subjects by role; style: they are styles, under an anchor that is none."""

    targets: tuple[str, ...]
    anchor: str
    neighbors: tuple[str, ...]
    style: bool = False


@dataclass(frozen=True)
class _Values:
    """One metric of one probe, an image a number: (n,) for the base and the ablated model (base None: no such value).

    neighbors: of `typical` alone, what its change is estimated from.
    """

    base: np.ndarray | None
    ablated: np.ndarray
    text: str = ""
    against: str = ""
    neighbors: NearestNeighbors | None = None


def score_probes(
    probes: Sequence[Probe], texts: Mapping[str, np.ndarray], subjects: Subjects, bootstrap: Bootstrap
) -> list[dict]:
    """The long table's rows, without the row's names: role, probe, model, metric, value, interval, n, text, against.

    Each probe has its rows, and so have, under the name and role that `POOLS` gives, all neighbors together, and all
    targets where there are several. The neighbor that lost most has rows of its own, see `_worst_neighbor`.

    Args:
        probes: one a subject.
        texts: subject -> (d,) text feature, for every target, the anchor and every neighbor.
    """
    _warn_of_equal_texts(texts)
    anchor = next((probe for probe in probes if probe.role == "anchor"), None)
    per_image = [_per_image(probe, texts, subjects, anchor) for probe in probes]
    rows = [
        row
        for probe, values in zip(probes, per_image, strict=True)
        for row in _summarise([probe], [values], probe.role, probe.subject, bootstrap)
    ]
    if subjects.style:
        for probe, values in zip(probes, per_image, strict=True):
            if probe.role == "target":
                rows += _neutral(anchor, texts, probe.subject, values["clip_accuracy"], bootstrap)
    for role, pool in POOLS.items():
        chosen = [index for index, probe in enumerate(probes) if probe.role == role]
        if len(chosen) > (role == "target"):
            members = [probes[i] for i in chosen], [per_image[i] for i in chosen]
            rows += _summarise(*members, pool, pool, bootstrap)
    return rows + _worst_neighbor(probes, per_image, bootstrap)


def _per_image(
    probe: Probe, texts: Mapping[str, np.ndarray], subjects: Subjects, anchor: Probe | None
) -> dict[str, _Values]:
    """Every metric of a probe but KID, which has no value an image; in the order of `UNITS`."""
    own = (probe.subject,) if probe.role in ("target", "neighbor") else subjects.targets
    values = {"clip_accuracy": _nearest(probe, texts, own, (*own, subjects.anchor))}
    if probe.role != "anchor":
        # The anchor is a wider word for the target and for most neighbors ("cat"): no rival of theirs.
        values["recognition"] = _nearest(probe, texts, own, (*subjects.targets, *subjects.neighbors))
    if probe.role != "neighbor" and subjects.neighbors and not subjects.style:
        values["content"] = _nearest(probe, texts, (subjects.anchor,), (subjects.anchor, *subjects.neighbors))
    for name, (base, ablated) in probe.measured.items():
        values[name] = _Values(base, ablated)
    # The target should become the anchor; all else should stay what it is.
    like = anchor if probe.role in ("target", "paraphrase") and anchor else probe
    nearest = NearestNeighbors.of(probe.base, probe.ablated, None if like is probe else like.base)
    values["typical"] = _Values(*nearest.typical(), like.subject, OTHER_SEEDS, nearest)
    meant = {PARAPHRASES.format(target): target for target in subjects.targets}
    word = meant[probe.subject] if probe.role == "paraphrase" else probe.subject
    cosines = [metrics.cosine(side, texts[word]) for side in (probe.base, probe.ablated)]
    values["clip_cosine"] = _Values(*cosines, word)
    values["clip_score_2_5"] = _Values(*(metrics.clip_score(side) for side in cosines), word)
    twins = np.sum(np.asarray(probe.base, dtype=np.float64) * probe.ablated, axis=1)
    values["image_similarity"] = _Values(None, twins, against=TWIN)
    return values


def _nearest(
    probe: Probe, texts: Mapping[str, np.ndarray], own: Sequence[str], among: Sequence[str]
) -> _Values:
    """Whether each image's nearest text, of the subjects `among`, is one of `own`."""
    known, indices = np.stack([texts[subject] for subject in among]), [among.index(name) for name in own]
    shares = (metrics.recognised(side, known, indices) for side in (probe.base, probe.ablated))
    return _Values(*shares, "; ".join(own), "; ".join(subject for subject in among if subject not in own))


def _worst_neighbor(
    probes: Sequence[Probe], values: Sequence[dict[str, _Values]], bootstrap: Bootstrap
) -> list[dict]:
    """The neighbor whose share of typical images fell most, under the role `WORST`.

    It was chosen for its loss, so its intervals are those that hold for all m neighbors at once: by Bonferroni's inequality
    each at the level 1 - (1 - confidence) / m. `typical`, since recognition stays at its top while pictures change.
    """
    changes = {
        index: float(np.mean(values[index]["typical"].ablated - values[index]["typical"].base))
        for index, probe in enumerate(probes)
        if probe.role == "neighbor"
    }
    if not changes:
        return []
    worst = min(changes, key=changes.get)
    options = _options([probes[worst]], bootstrap)
    options["confidence"] = 1 - (1 - bootstrap.confidence) / len(changes)
    place = {"probe": probes[worst].subject, "role": WORST, "metric": "typical"}
    return _metric_rows(place, [values[worst]["typical"]], options)


def _neutral(
    anchor: Probe,
    texts: Mapping[str, np.ndarray],
    target: str,
    accuracy: _Values,
    bootstrap: Bootstrap,
) -> list[dict]:
    """How often the anchor's images pass for the target, a style, and how much more often its own images still do.

    A style can't be seen less often than in the base model's neutral images, so the verdict compares these two shares.
    """
    place = {"probe": target, "role": "target"}
    values = _nearest(anchor, texts, (target,), (target, anchor.subject))
    above = metrics.share_difference(accuracy.ablated, values.base, confidence=bootstrap.confidence)
    words = {"text": values.text, "against": values.against, "model": "ablated"}
    return [
        *_metric_rows(place | {"metric": "neutral_share"}, [values], _options([anchor], bootstrap)),
        place | {"metric": "above_neutral"} | words | _fields(above),
    ]


def _summarise(
    probes: Sequence[Probe], values: Sequence[dict[str, _Values]], role: str, name: str, bootstrap: Bootstrap
) -> list[dict]:
    """Rows of one probe, or of several pooled: base, ablated and their difference for each metric."""
    options, rows = _options(probes, bootstrap), []
    for metric in values[0]:
        place = {"probe": name, "role": role, "metric": metric}
        rows += _metric_rows(place, [value[metric] for value in values], options)
    kid = metrics.kid_estimate([(probe.ablated, probe.base) for probe in probes], **options)
    scaled = Estimate(1000 * kid.value, 1000 * kid.low, 1000 * kid.high, kid.n, kid.interval)
    place = {"probe": name, "role": role, "metric": "kid_x1000", "text": "", "against": SAME_PROMPTS}
    return rows + [place | {"model": "ablated"} | _fields(scaled)]


def _options(probes: Sequence[Probe], bootstrap: Bootstrap) -> dict:
    """How intervals are made. Seeds that all the probes share are drawn together: they may move all the same way."""
    joint = len({probe.seeds for probe in probes}) == 1 and bool(probes[0].seeds)
    level = {"confidence": bootstrap.confidence, "draws": bootstrap.draws, "seed": bootstrap.seed}
    return level | {"joint": joint}


def _metric_rows(place: dict, values: Sequence[_Values], options: dict) -> list[dict]:
    """One metric's rows, from its values in one probe or in each of several."""
    first, groups = values[0], np.repeat(np.arange(len(values)), [len(value.ablated) for value in values])
    ablated = np.concatenate([value.ablated for value in values])
    base = None if first.base is None else np.concatenate([value.base for value in values])
    alone = len(values) == 1
    place = place | {"text": first.text if alone else "", "against": first.against if alone else ""}
    estimates = _estimates(place["metric"] in SHARES, base, ablated, groups, options)
    if first.neighbors is not None:
        estimates["difference"] = typical_change([value.neighbors for value in values], **options)
    return [place | {"model": model} | _fields(estimate) for model, estimate in estimates.items()]


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


def _warn_of_equal_texts(texts: Mapping[str, np.ndarray]) -> None:
    names = list(texts)
    for i, first in enumerate(names):
        for second in names[:i]:
            if metrics.cosine(texts[first][None], texts[second])[0] > 1 - metrics.TIE:
                log.warning(
                    "the scorer reads %r and %r as the same text: no score can tell them apart", second, first
                )
