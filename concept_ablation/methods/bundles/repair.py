"""Stage `repair_bundle`: what came back or was lost under a bundle's model is trained some steps, and judged again.

A row is judged as a search for its strength judges it: on validation pictures, which the report never shows. The rows that fail are
trained together. Their loss moves their targets to their anchors, and holds their anchor's and neighbors' prompts to the *unchanged*
model, so that what was lost comes back, too. What the other rows' prompts give stays as the bundle's model gives it (null space). A
round counts only if fewer rows fail after it, or as many that lie less far beyond their limits; otherwise it is undone, and no other
round follows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from concept_ablation.common.files import atomic_output
from concept_ablation.common.progress import progress_bar
from concept_ablation.diffusion.delta import delta_parameters, load_delta, save_delta
from concept_ablation.diffusion.stages import load_model
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.validation import Finding, Spending, Validation
from concept_ablation.methods.ablation.settings import TrainingError, TrainingSettings
from concept_ablation.methods.bundles.training import Kept, Lessons, begin, prompts_for
from concept_ablation.methods.strength import Change, Weights, put

log = logging.getLogger(__name__)
ROUNDS = 2
"""Rounds at most. A third has the same pictures to go by, of which each proof may use half of the error that is left."""
TEXTS, NUMBERS = ("concept", "role", "subject"), ("before", "before_high", "after", "after_high", "limit")
COLUMNS = pa.schema(
    [("round", pa.int64()), *((name, pa.string()) for name in TEXTS)]
    + [(name, pa.float64()) for name in NUMBERS]
    + [("trained", pa.bool_()), ("taken", pa.bool_())]
)
"""A line a round, row and role. `before`, `after`: of a target the share of its pictures that still show it, else the loss, with upper
bounds; None where it wasn't looked at. `trained`: the row failed before this round. `taken`: the round's weights were taken."""


def repair_bundle(
    spec: Mapping,
    source: str | Path,
    anchors: Sequence[str | Path],
    prompts: Sequence[str | Path],
    delta: str | Path,
    repair: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Write the repaired delta of a bundle, and the record of what was judged.

    source: the bundle's delta. anchors, prompts: as for `train_bundle`. Raises TrainingError, StoreError, ModelError, PromptsError,
    FeatureError, DeltaError.
    """
    tensors, metadata = load_delta(source)
    made = _Repair(spec, Lessons(spec, anchors, prompts), tensors, device, batch_size)
    lines = made.run()
    with atomic_output(repair) as part:
        pq.write_table(pa.Table.from_pylist(lines, COLUMNS), part)
    rounds = {line["round"] for line in lines if line["taken"] and line["round"]}
    save_delta(delta, dict(made.weights.parameters), metadata | {"repaired": len(rounds)})
    log.info("repaired in %d rounds: %s", len(rounds), delta)


class _Repair:
    """The rounds of a bundle's repair. `weights`: the pipeline's, those of the bundle."""

    def __init__(
        self,
        spec: Mapping,
        lessons: Lessons,
        tensors: Mapping[str, torch.Tensor],
        device: str,
        batch_size: int,
    ) -> None:
        self.spec, self.lessons = spec, lessons
        self.pipeline = load_model(spec["model"], device)
        self.settings = replace(TrainingSettings.from_spec(spec["training"]), preserve="distill")
        own = delta_parameters(self.pipeline, tensors)
        self.weights = Weights({name: own[name] for name in tensors})
        self.change = Change(self.weights)  # it starts at the unchanged model
        put(self.weights.parameters, tensors)
        scorers: dict[tuple, ClipScorer] = {}
        self.judges = []
        for row in lessons.rows:
            judge = Validation(row, self.pipeline, batch_size, scorers)
            judge.unchanged = functools.partial(self.change.at, 0.0)
            self.judges.append((judge, Spending(row["validation"]["alpha"])))

    def run(self) -> list[dict]:
        """Judge, and repair while that helps; the record's lines. Round 0 is the bundle as it came."""
        found, lines = self._judge("judging"), []
        lines += self._lines(0, found, found, [], True)
        for number in range(1, ROUNDS + 1):
            failed = [row for row, own in zip(self.lessons.rows, found, strict=True) if not _passes(own)]
            if not failed:
                break
            before = {name: value.detach().clone() for name, value in self.weights.parameters.items()}
            self._train(failed)
            after = self._judge(f"round {number}")
            better = _badness(after) < _badness(found)
            lines += self._lines(number, found, after, failed, better)
            if not better:
                put(self.weights.parameters, before)
                log.warning("round %d didn't help, so it is undone", number)
                break
            found = after
        return lines

    def _judge(self, label: str) -> list[Finding]:
        bar = progress_bar(self.judges, desc=label, unit="row")
        return [judge.look(spending) for judge, spending in bar]

    def _train(self, failed: Sequence[Mapping]) -> None:
        """Train some of the rows for some steps, from the bundle's weights; the unchanged model is what distillation holds to."""
        fine = [row for row in self.lessons.rows if row not in failed]
        preserved = self.lessons.preserved(failed)
        with self.change.at(0.0):
            training = begin(self.pipeline, self.lessons, failed, self.settings, self.spec["seed"], preserved)
            kept = Kept(self.pipeline)
            kept.add(["", *prompts_for(fine), *self.lessons.preserved(fine)] if fine else [""])
        try:
            kept.hold(training, self.settings.preserve_tolerance)
        except (
            TrainingError
        ) as error:  # so many rows are fine that nothing is free: the judging has the last word
            log.warning("%s; without that", error)
        steps, label = training.settings.steps, f"{len(failed)} rows"
        for _ in progress_bar(training, desc=label, total=steps, unit="step"):
            pass

    def _lines(
        self,
        number: int,
        before: Sequence[Finding],
        after: Sequence[Finding],
        failed: Sequence[Mapping],
        taken: bool,
    ) -> list[dict]:
        lines = []
        for row, one, two, (judge, _) in zip(self.lessons.rows, before, after, self.judges, strict=True):
            own = {"round": number, "concept": row["concept"], "trained": row in failed, "taken": taken}
            sides = (_measured(one, row), _measured(two, row))
            for role, subject, (value, high), (later, later_high) in _paired(*sides):
                limit = two.target_limit if role == "target" else getattr(judge.limits, f"{role}_loss_max")
                numbers = dict(zip(NUMBERS, (value, high, later, later_high, limit), strict=True))
                lines.append(own | {"role": role, "subject": subject} | numbers)
        return lines


def _passes(found: Finding) -> bool:
    """Whether the targets are gone and nothing is harmed."""
    return found.gone and bool(found.kept)


def _badness(found: Sequence[Finding]) -> tuple[int, float]:
    """How many rows fail, and how far beyond their limits they lie together."""
    failed = [own for own in found if not _passes(own)]
    return len(failed), sum(max(own.excess, 0.0) for own in failed)


def _measured(found: Finding, row: Mapping) -> dict[str, tuple[str | None, float | None, float | None]]:
    """Role -> subject, value and upper bound."""
    return {
        "target": (found.target, found.target_share, found.target_limit + found.target_excess_high),
        "anchor": (row["anchor"], found.anchor_loss, found.anchor_loss_high),
        "neighbor": (None, found.neighbor_loss, found.neighbor_loss_high),
        "worst_neighbor": (found.worst_neighbor, found.worst_neighbor_loss, found.worst_neighbor_loss_high),
    }


def _paired(before: Mapping, after: Mapping):
    """Role, subject, and value with bound of both; the subject is that of after, if it was looked at."""
    for role, (subject, *values) in before.items():
        later, *more = after[role]
        yield role, later or subject, values, more
