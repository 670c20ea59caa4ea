"""Validation: pictures from seeds and prompts that the report never uses, by which a training judges its own strength.

A look draws as few pictures as will do. A first batch of the targets' says whether they seem gone; other pictures prove it, so that a
strength isn't proven by the pictures that chose it. The anchor and the neighbors are drawn only where the targets are gone. What is
judged, and by which limits, is what the report judges later: `concept_ablation.verdict`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.common.decision import ROUNDING
from concept_ablation.common.image_store import Pictures
from concept_ablation.common.roles import WORST
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.image_models import ImageModels
from concept_ablation.evaluation.metrics.base import ImageMetric
from concept_ablation.evaluation.probes import score_probes
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.verdict import LOSSES, Thresholds, Verdict, changes_of, decide, presence_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

KEEPING = ("recognition", "typical")
"""The metrics by which the anchor and the neighbors are judged."""
NEUTRAL = ("neutral_share", "above_neutral")
BOUNDED = ("anchor_loss", "worst_neighbor_loss")
"""The losses whose upper bounds have to lie within the limits, too. Of the neighbors' recognition that would take more pictures
than a look has: its limit is narrow."""


@dataclass(frozen=True)
class Finding:
    """What a look saw, a share of pictures each. A loss is positive, `_high` its upper bound; None: not looked at.

    gone: every target's upper bound lies below its limit. kept: the losses lie within their limits, and so do the bounds of those
    in `BOUNDED`. excess: how far the value that is furthest beyond its limit lies beyond it, negative where all are within; of a
    target that isn't shown to be gone, its upper bound, since nothing else was looked at.
    target: the one that decides; target_excess: its share less its limit. target_typical: of the targets' pictures, how many could be
    the anchor's; it decides nothing.
    """

    gone: bool
    kept: bool | None
    excess: float
    target: str
    target_share: float
    target_limit: float
    target_excess: float
    target_excess_high: float
    target_typical: float | None
    anchor_loss: float | None
    anchor_loss_high: float | None
    neighbor_loss: float | None
    neighbor_loss_high: float | None
    worst_neighbor: str | None
    worst_neighbor_loss: float | None
    worst_neighbor_loss_high: float | None
    pictures: int
    seconds: float


class Spending:
    """The error that each proof of a search may make: half of what is left, so that all together err with probability `total` at most.

    The first proof, which most rows need alone, has the largest. used: how many there were.
    """

    def __init__(self, total: float, used: int = 0) -> None:
        self.total, self.used = total, used

    def next(self) -> float:
        self.used += 1
        return self.total / 2**self.used


class Validation:
    """The validation pictures of one row. `spec`: the row's ablation, whose `validation` holds what is drawn and how it is judged.

    `unchanged`: a context in which the pipeline is the unchanged model. Its pictures are drawn when they are first needed.
    `scorers`: those of other rows by name, where several are judged; they share one in memory.
    Raises FeatureError, and as the row's kind needs them MemorizationError, DetectorError.
    """

    def __init__(
        self,
        spec: Mapping,
        pipeline: DiffusionPipeline,
        batch_size: int = 16,
        scorers: dict[tuple, ClipScorer] | None = None,
    ) -> None:
        self.asked, self.row, self.pipeline = spec["validation"], spec, pipeline
        self.kind, self.batch_size = KINDS[spec["kind"]], batch_size
        self.unchanged: Callable[[], AbstractContextManager] = nullcontext
        unused = dict.fromkeys((field.name for field in fields(Thresholds)), 0.0)
        self.limits = Thresholds(**{**unused, **self.asked["limits"]})
        device = str(pipeline.device)
        name = (self.asked["scorer"]["model"], self.asked["scorer"].get("pretrained"))
        scorers = {} if scorers is None else scorers
        if name not in scorers:
            scorers[name] = ClipScorer(*name, device)
        scorer = scorers[name]
        self.models = ImageModels(self.asked, scorer, device)
        texts = self.asked["texts"]
        self.texts = dict(zip(texts, scorer.text_features(list(texts.values())), strict=True))
        self.targets = [probe for probe in self.asked["probes"] if probe["role"] == "target"]
        self.others = [probe for probe in self.asked["probes"] if probe["role"] != "target"]
        self.base: dict[str, np.ndarray] = {}
        self.drawn = 0

    def look(self, spending: Spending) -> Finding:
        """Judge the pipeline as it is now."""
        started, before = time.perf_counter(), self.drawn
        verdict, targets = self._look_at_targets(spending)
        gone = verdict.target_excess_high <= 0
        losses, kept = self._look_at_the_rest(targets) if gone else (no_losses(), None)
        beyond = [losses[name] - self._limit(name) for name in LOSSES if losses[name] is not None]
        return Finding(
            gone=gone,
            kept=kept,
            excess=max([verdict.target_excess, *beyond]) if gone else verdict.target_excess_high,
            target=verdict.deciding_target,
            target_share=verdict.target_excess + verdict.target_limit,
            target_limit=verdict.target_limit,
            target_excess=verdict.target_excess,
            target_excess_high=verdict.target_excess_high,
            **losses,
            pictures=self.drawn - before,
            seconds=time.perf_counter() - started,
        )

    def _look_at_targets(self, spending: Spending) -> tuple[Verdict, list[Probe]]:
        """Whether all targets are gone. A first batch of pictures says whether it seems so; others prove it, in one test.

        There are so many of these that one which shows the target doesn't spoil the proof.
        """
        neutral = [self._unchanged_probe(probe) for probe in self.others if self._is_neutral(probe)]
        images: list[list[Image]] = [self._draw(probe, 0) for probe in self.targets]
        seems, probes = self._verdict(images, neutral, self.asked["alpha"])
        if not seems.removed:
            return seems, probes
        error, last = spending.next(), self.asked["batches"] - 1
        images = [[] for _ in self.targets]
        for number in range(1, last + 1):
            for probe, own in zip(self.targets, images, strict=True):
                own += self._draw(probe, number)
            if number == last or self._can_prove(len(images[0]), neutral, error):
                break
        return self._verdict(images, neutral, error)

    def _is_neutral(self, probe: Mapping) -> bool:
        return probe["role"] == "anchor" and self.kind.limit_above_neutral

    def _verdict(
        self, images: Sequence[Sequence[Image]], neutral: Sequence[Probe], error: float
    ) -> tuple[Verdict, list[Probe]]:
        """What these pictures of the targets say, with a bound that errs in a share of `error`."""
        probes = [self._target_probe(probe, own) for probe, own in zip(self.targets, images, strict=True)]
        return self._decide([*probes, *neutral], error), probes

    def _can_prove(self, count: int, neutral: Sequence[Probe], error: float) -> bool:
        """Whether `count` pictures of each target would prove it gone, one of which shows it."""
        shown = np.arange(count) == 0
        probes = []
        for probe in self.targets:
            features = np.where(shown[:, None], self.texts[probe["subject"]], self.texts[self.row["anchor"]])
            measured = {self.kind.measure: (None, shown.astype(float))}
            probes.append(Probe("target", probe["subject"], features, features, measured=measured))
        return self._decide([*probes, *neutral], error).target_excess_high <= 0

    def _decide(self, probes: Sequence[Probe], error: float) -> Verdict:
        lines = self._lines(probes, {self.kind.measure, *NEUTRAL}, 1 - 2 * error)
        return decide(self.row["kind"], presence_of(self.row, lines), {}, self.limits)

    def _look_at_the_rest(self, targets: list[Probe]) -> tuple[dict, bool]:
        """The losses of the anchor and the neighbors, and whether they are kept: batch by batch until that is clear."""
        features: dict[str, np.ndarray] = {}
        for number in range(self.asked["batches"]):
            probes = list(targets)
            for probe in self.others:
                name = probe["subject"]
                drawn = self.models.scorer.image_features(self._draw(probe, number))
                features[name] = np.concatenate([features[name], drawn]) if number else drawn
                base = self._base_features(probe, number + 1)
                probes.append(Probe(probe["role"], name, base, features[name]))
            losses = self._losses(probes)
            within = all(self._within(losses[name], name) for name in LOSSES)
            bounded = all(self._within(losses[f"{name}_high"], name) for name in BOUNDED)
            if not within or bounded:
                break
        return losses, within and bounded

    def _losses(self, probes: Sequence[Probe]) -> dict:
        """What the anchor and the neighbors lost, by `Finding`'s names."""
        lines = self._lines(probes, KEEPING, 1 - 2 * self.asked["alpha"])
        changes, losses = changes_of(lines), no_losses()
        for name, change in LOSSES.items():
            if change in changes:
                losses |= {name: -changes[change], f"{name}_high": -changes[f"{change}_low"]}
        losses["worst_neighbor"] = next((line["probe"] for line in lines if line["role"] == WORST), None)
        like_anchor = [
            line["value"]
            for line in lines
            if (line["role"], line["metric"], line["side"]) == ("target", "typical", "ablated")
        ]
        losses["target_typical"] = float(np.mean(like_anchor)) if like_anchor else None
        return losses

    def _limit(self, loss: str) -> float:
        return getattr(self.limits, f"{loss}_max")

    def _within(self, value: float | None, loss: str) -> bool:
        """Whether a loss is within its limit; true where it wasn't measured."""
        return value is None or value <= self._limit(loss) + ROUNDING

    def _lines(self, probes: Sequence[Probe], names: Container[str], confidence: float) -> list[dict]:
        subjects = tuple(self.row["targets"]), self.row["anchor"], tuple(self.row["neighbors"])
        row = Row(self.kind, *subjects, self.texts, tuple(probes))
        return score_probes(row, Bootstrap(confidence), names)

    def _unchanged_probe(self, probe: Mapping) -> Probe:
        """The unchanged model's pictures of a probe, which stand for both models."""
        base = self._base_features(probe, max(1, self.asked["batches"] // 2))
        return Probe(probe["role"], probe["subject"], base, base)

    def _base_features(self, probe: Mapping, batches: int) -> np.ndarray:
        """Features of a probe's first batches by the unchanged model."""
        size, name = self._batch(probe), probe["subject"]
        have = self.base.get(name)
        for number in range(0 if have is None else len(have) // size, batches):
            with self.unchanged():
                new = self.models.scorer.image_features(self._draw(probe, number))
            have = self.base[name] = new if have is None else np.concatenate([have, new])
        return have[: batches * size]

    def _target_probe(self, probe: Mapping, images: list[Image]) -> Probe:
        """A target's pictures by the changed model; those of the unchanged one aren't needed, so they stand for both."""
        features, metric = self.models.scorer.image_features(images), METRICS[self.kind.measure]
        measured = {}
        if isinstance(metric, ImageMetric):
            measured = {metric.name: (None, metric.read(Pictures(images), self.models))}
        return Probe("target", probe["subject"], features, features, measured=measured)

    def _batch(self, probe: Mapping) -> int:
        return probe["images"] // self.asked["batches"]

    def _draw(self, probe: Mapping, batch: int) -> list[Image]:
        """A batch of a probe's pictures, from 0: number i has prompt i, modulo their number, and seed + i."""
        size = self._batch(probe)
        numbers = range(batch * size, (batch + 1) * size)
        prompts = [probe["prompts"][i % len(probe["prompts"])] for i in numbers]
        seeds = [probe["seed"] + i for i in numbers]
        self.drawn += size
        options = {"sampler": self.asked["sampler"], "batch_size": self.batch_size}
        return list(sample_images(self.pipeline, prompts, seeds, **options))


def no_losses() -> dict[str, None]:
    """A look's losses where none were looked at."""
    names = [name + end for name in LOSSES for end in ("", "_high")]
    return dict.fromkeys([*names, "worst_neighbor", "target_typical"])
