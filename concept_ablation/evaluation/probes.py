"""The scores of a row's probes: mathematics on features, no files and no models.

A probe is the images of one subject, made twice with the same prompts and seeds, by the base and by the ablated model.
`score_probes` asks every metric of `registries.METRICS` and gives the rows of the long table; docs/report.md defines them.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import numpy as np

from concept_ablation.common.parts import timed
from concept_ablation.common.roles import POOLS, WORST, is_pooled
from concept_ablation.evaluation.metrics.base import Metric, RowMetric, Values
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import TIE, Bootstrap, cosine
from concept_ablation.registries import METRICS

log = logging.getLogger(__name__)

CHOOSES_WORST = "typical"
"""The metric by which the worst neighbor is chosen: `recognition` stays at its top while pictures change."""


@timed("scoring")
def score_probes(row: Row, bootstrap: Bootstrap, names: Container[str] | None = None) -> list[dict]:
    """The long table's rows, without the row's names: probe, role, pooled, model, metric, value, interval, n, text, against.

    `names`: the metrics to take, of those that apply to the row's kind; None: all.

    Each probe has its rows, and so have, under the name and role that `POOLS` gives, all neighbors together, and all
    targets where there are several. The neighbor that lost most has rows of its own, see `_worst_neighbor`.
    """
    _warn_of_equal_texts(row.texts)
    metrics = [
        metric
        for name, metric in METRICS.items()
        if (names is None or name in names) and metric.applies(row.kind)
    ]
    whole = [metric for metric in metrics if isinstance(metric, RowMetric)]
    single = [metric for metric in metrics if metric not in whole]
    values = [_values(probe, row, single) for probe in row.probes]
    lines = []
    for probe, own in zip(row.probes, values, strict=True):
        lines += _lines([probe], [own], probe.role, probe.subject, bootstrap)
    for probe in row.probes:
        lines += _lines([probe], [_values(probe, row, whole)], probe.role, probe.subject, bootstrap)
    for role, pool in POOLS.items():
        chosen = [index for index, probe in enumerate(row.probes) if probe.role == role]
        if len(chosen) > (role == "target"):
            members = [row.probes[i] for i in chosen], [values[i] for i in chosen]
            lines += _lines(*members, pool, pool, bootstrap)
    return lines + _worst_neighbor(row.probes, values, bootstrap)


def _values(probe: Probe, row: Row, metrics: Sequence[Metric]) -> dict[str, Values]:
    """The probe's values of those metrics that it has, in the order of the registry."""
    asked = {metric.name: metric.values(probe, row) for metric in metrics if probe.role in metric.roles}
    return {name: values for name, values in asked.items() if values is not None}


def _worst_neighbor(
    probes: Sequence[Probe], values: Sequence[Mapping[str, Values]], bootstrap: Bootstrap
) -> list[dict]:
    """The neighbor whose share of typical images fell most, under the role `WORST`.

    It was chosen for its loss, so its intervals are those that hold for all m neighbors at once: by Bonferroni's inequality
    each at the level 1 - (1 - confidence) / m.
    """
    changes = {
        index: float(np.mean(values[index][CHOOSES_WORST].ablated - values[index][CHOOSES_WORST].base))
        for index, probe in enumerate(probes)
        if probe.role == "neighbor" and CHOOSES_WORST in values[index]
    }
    if not changes:
        return []
    worst = min(changes, key=changes.get)
    corrected = replace(bootstrap, confidence=1 - (1 - bootstrap.confidence) / len(changes))
    chosen = {CHOOSES_WORST: values[worst][CHOOSES_WORST]}
    return _lines([probes[worst]], [chosen], WORST, probes[worst].subject, corrected)


def _lines(
    probes: Sequence[Probe],
    values: Sequence[Mapping[str, Values]],
    role: str,
    name: str,
    bootstrap: Bootstrap,
) -> list[dict]:
    """Rows of one probe, or of several pooled: base, ablated and their difference for each metric that has them."""
    # Seeds that all the probes share are drawn together: they may move all the same way.
    joint = len({probe.seeds for probe in probes}) == 1 and bool(probes[0].seeds)
    # Probes that are pooled are drawn in step, so they have as many looks.
    taken, most = probes[0].looks or (None, None)
    drawing, lines = replace(bootstrap, joint=joint, looks=most or 1), []
    for metric in (METRICS[metric] for metric in values[0]):
        members = [own[metric.name] for own in values]
        place = {"probe": name, "role": role, "pooled": is_pooled(role), "metric": metric.name}
        place |= {"text": "", "against": metric.pooled_against, "looks": taken, "looks_most": most}
        if len(members) == 1:
            place |= {"text": members[0].text, "against": members[0].against}
        for side, estimate in metric.estimates(members, drawing).items():
            line = {"value": estimate.value, "ci_low": estimate.low, "ci_high": estimate.high}
            lines.append(place | line | {"side": side, "n": estimate.n, "interval": estimate.interval})
    return lines


def _warn_of_equal_texts(texts: Mapping[str, np.ndarray]) -> None:
    names = list(texts)
    for i, first in enumerate(names):
        for second in names[:i]:
            if cosine(texts[first][None], texts[second])[0] > 1 - TIE:
                log.warning(
                    "the scorer reads %r and %r as the same text: no score can tell them apart", second, first
                )
