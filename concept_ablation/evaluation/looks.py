"""Stage `sample_ablated`: a row's pictures by the ablated model, as many as are needed.

Where `evaluation.until` is off, every probe has its `images`. Where it is on, these are the most. They are drawn in *looks* of a fixed
size, in one job with both models loaded: after each the row is judged as the report will judge it, with intervals that hold at all
looks at once, and a lane (`roles.LANES`) is drawn no further once all that it decides is clear.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.common.image_store import ImageStore, Pictures, open_store
from concept_ablation.common.parts import timed
from concept_ablation.common.roles import LANES, planned_looks
from concept_ablation.diffusion import stages
from concept_ablation.diffusion.delta import apply_delta, sampling_of
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.image_models import ImageModels
from concept_ablation.evaluation.metrics.base import ImageMetric
from concept_ablation.evaluation.probes import score_probes
from concept_ablation.evaluation.row import Looks, Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.verdict import Parts, Presence, Thresholds, changes_of, parts_of, presence_of

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

DECIDING = ("recognition", "typical", "neutral_share", "above_neutral")
"""The metrics that decide, beside the kind's own measure."""


def sample_ablated(
    spec: Mapping,
    delta: str | Path,
    images: str | Path,
    base: Sequence[str | Path] = (),
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """All probes of a row by the model with its delta.

    Args:
        spec: model, sampler, delta, probes; and where pictures are added until they are enough, `until` {half_width, decided, look},
            limits (of the verdict, if `decided`) and what the row is scored with, as `scoring.score_concept` takes it.
        base: image stores of the unchanged model, one a probe; needed with `until`.

    Raises FeatureError, MemorizationError, DetectorError, StoreError, SamplerError, DeviceError.
    """
    drawing = {"device": device, "batch_size": batch_size}
    if "until" not in spec:
        stages.sample_ablated(spec, delta, images, **drawing)
        return
    pipeline = stages.load_model(spec["model"], device)
    applied = apply_delta(pipeline, delta)
    judge = Judge(spec, base, str(pipeline.device))

    def rows() -> Iterator[dict]:
        label, look = Path(images).stem, spec["until"]["look"]
        options = {"sampler": spec["sampler"], "batch_size": batch_size, **sampling_of(applied)}
        for number in range(judge.most):
            numbers, probes = slice(number * look, (number + 1) * look), judge.open_probes()
            if not probes:
                break
            bar = f"{label}: look {number + 1} of at most {judge.most}"
            made = stages.draw_probes(pipeline, probes, numbers, **options, progress=bar)
            drawn: dict[tuple, list[Image]] = {}
            for row in made:
                drawn.setdefault((row["role"], row["subject"]), []).append(row["image"])
                yield row
            judge.look(drawn)

    stages.write_images(images, rows(), pipeline, spec, {"delta_metadata": applied})


class Judge:
    """What is known of a row while its pictures are drawn. `spec`, `base`: as for `sample_ablated`."""

    def __init__(self, spec: Mapping, base: Sequence[str | Path], device: str) -> None:
        self.spec, self.until, self.kind = spec, spec["until"], KINDS[spec["kind"]]
        scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), device)
        self.models = ImageModels(spec, scorer, device)
        texts = scorer.text_features(list(spec["texts"].values()))
        self.texts = dict(zip(spec["texts"], texts, strict=True))
        places = [(probe["role"], probe["subject"]) for probe in spec["probes"]]
        self.base: dict[tuple, ImageStore] = dict(zip(places, map(open_store, base), strict=True))
        self.planned = planned_looks(spec["probes"], self.until["look"])
        self.most = max(self.planned.values())
        self.left = {
            lane: self.planned[role]
            for lane, roles in LANES.items()
            for role in roles
            if role in self.planned
        }
        self.open, self.taken = set(self.left), dict.fromkeys(self.left, 0)
        # Of a place the features of its pictures by both models, and what the kind's measure reads in them.
        self.seen: dict[tuple, list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]] = {}
        unused = dict.fromkeys((field.name for field in fields(Thresholds)), 0.0)
        self.limits = Thresholds(**{**unused, **spec.get("limits", {})})
        asked = spec["statistics"]
        self.bootstrap = Bootstrap(asked["confidence"], asked["bootstrap"], asked["seed"])

    def open_probes(self) -> list[Mapping]:
        """The probes that are drawn further."""
        roles = {role for lane in self.open for role in LANES[lane]}
        return [probe for probe in self.spec["probes"] if probe["role"] in roles]

    @timed("scoring")
    def look(self, drawn: Mapping[tuple, Sequence[Image]]) -> None:
        """Add pictures, by role and subject, each probe's next ones; then see which lanes are still open."""
        for place, pictures in drawn.items():
            if place[0] != "paraphrase":  # which decides nothing
                self._see(place, pictures)
        for lane in self.open:
            self.taken[lane] += 1
            self.left[lane] -= 1
        parts = parts_of(self.spec["kind"], *self.measured(), self.limits)
        unclear = open_lanes(parts, self.until["half_width"], self.until["decided"])
        self.open &= unclear & {lane for lane, left in self.left.items() if left}
        for lane, taken in self.taken.items():
            log.info("lane %s: %d looks, %s", lane, taken, "unclear" if lane in unclear else "enough")

    def _see(self, place: tuple, pictures: Sequence[Image]) -> None:
        seen, metric = self.seen.setdefault(place, []), METRICS[self.kind.measure]
        start = sum(len(ablated) for _, ablated, _ in seen)
        before = [self.base[place].image(number) for number in range(start, start + len(pictures))]
        features = [self.models.scorer.image_features(side) for side in (before, pictures)]
        read = None
        if place[0] == "target" and isinstance(metric, ImageMetric):
            read = np.stack([metric.read(Pictures(side), self.models) for side in (before, pictures)])
        seen.append((*features, read))

    def measured(self) -> tuple[list[Presence], dict[str, float]]:
        """What the verdict is made of, as `verdict.decide` takes it, from the pictures so far."""
        probes = []
        for (role, subject), seen in self.seen.items():
            base, ablated, measured = zip(*seen, strict=True)
            own = {} if measured[0] is None else {self.kind.measure: tuple(np.hstack(measured))}
            taken = next(self.taken[lane] for lane, roles in LANES.items() if role in roles)
            sides, looks = map(np.concatenate, (base, ablated)), Looks(taken, self.planned[role])
            probes.append(Probe(role, subject, *sides, measured=own, looks=looks))
        subjects = tuple(self.spec["targets"]), self.spec["anchor"], tuple(self.spec["neighbors"])
        row = Row(self.kind, *subjects, self.texts, tuple(probes))
        lines = score_probes(row, self.bootstrap, {self.kind.measure, *DECIDING})
        return presence_of(self.spec, lines), changes_of(lines)


def open_lanes(parts: Parts, half_width: float | None, decided: bool) -> set[str]:
    """The lanes of which something is still unclear: an interval that is wider than +- half_width (None: whatever its width), and
    with `decided` holds its limit, too.

    With `decided`, a target that is shown to be still there decides the row: then nothing is unclear.
    """
    if decided and parts.removed.settled and not parts.removed.within:
        return set()
    lanes = {"target": [*parts.targets, parts.anchor], "neighbor": [parts.neighbors, parts.worst]}
    return {
        lane
        for lane, decisions in lanes.items()
        for part in filter(None, decisions)
        if not (decided and part.settled or half_width is not None and part.half_width <= half_width)
    }
