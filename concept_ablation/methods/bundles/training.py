"""Stage `train_bundle`: one model of many rows, trained on the pictures of their anchors.

A training has parts, one after the other; each has some of the rows, and starts from what the part before left. It preserves what
all rows preserve, less the prompts that name a target of any of them, and the target prompts of the parts before: these as the model
gives them when the part begins. Nothing depends on the table's order, since a spec's rows are sorted by their content.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from concept_ablation.common.progress import progress_bar
from concept_ablation.diffusion.delta import delta_parameters, save_delta
from concept_ablation.diffusion.stages import load_model
from concept_ablation.methods.ablation.checkpoints import load_checkpoint, save_checkpoint
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.preservation import (
    NullSpace,
    prompts_of_all,
    read_rows,
    second_moment,
    span,
)
from concept_ablation.methods.ablation.settings import TrainingError, TrainingSettings
from concept_ablation.methods.ablation.stage import target_prompts
from concept_ablation.methods.ablation.training import Training
from concept_ablation.methods.bundles.stage import describe_bundle
from concept_ablation.methods.records import write_records
from concept_ablation.methods.strength import put
from concept_ablation.registries import WAYS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


def train_bundle(
    spec: Mapping,
    anchors: Sequence[str | Path],
    prompts: Sequence[str | Path],
    delta: str | Path,
    training: str | Path,
    *,
    device: str = "auto",
    checkpoint_steps: int = 0,
) -> None:
    """Write the delta of the model that is trained on all rows' pictures, and the table of its steps.

    anchors: image stores in the order of the spec's `anchors`; prompts: files in that of its `prompts`. Every `checkpoint_steps`
    steps (0: never) a checkpoint is written, from which a killed run goes on; it is removed at the end. Raises TrainingError,
    StoreError, ModelError, PromptsError.
    """
    folder = Path(delta).parent
    checkpoint = folder.parents[1] / "checkpoints" / f"{folder.name}.pt" if checkpoint_steps else None
    pipeline = load_model(spec["model"], device)
    rows = Lessons(spec, anchors, prompts)
    course = _Course(spec, rows, pipeline, checkpoint, checkpoint_steps)
    start, parameters = course.run()
    values = {
        name: start[name] + spec["scale"] * (value.detach() - start[name])
        for name, value in parameters.items()
    }
    metadata = describe_bundle(spec) | {"group": spec["training"]["group"]}
    write_records(training, course.records, metadata)
    save_delta(delta, values, metadata)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    log.info("trained %d rows (%s) in %d steps: %s", len(rows.rows), spec["how"], len(course.records), delta)


class Lessons:
    """A spec's rows with their prompts, `rows`, and their anchors' pictures."""

    def __init__(self, spec: Mapping, anchors: Sequence[str | Path], prompts: Sequence[str | Path]) -> None:
        self.rows = read_rows(spec["concepts"], spec["prompts"], prompts)
        self.general, self.paths = spec["general"], dict(zip(spec["anchors"], anchors, strict=True))

    def data(self, rows: Sequence[Mapping]) -> tuple[AnchorData, list[tuple[str, ...]]]:
        """The pictures of some of the rows, and each picture's target prompts. Rows of one anchor share its pictures in memory."""
        stores = {
            key: AnchorData.from_store(self.paths[key]) for key in {row["anchors"]: None for row in rows}
        }
        images, prompts, targets = [], [], []
        for row in rows:
            own, words = stores[row["anchors"]], {"training": {"style_templates": row["templates"]}}
            targets += target_prompts({**row, **words}, own, self.paths[row["anchors"]])
            images += own.images
            prompts += own.prompts
        return AnchorData(images, prompts), targets

    def preserved(self, rows: Sequence[Mapping]) -> list[str]:
        """What some of the rows preserve, without the prompts that name a target of any row of the bundle."""
        gone = [target for row in self.rows for target in row["targets"]]
        return prompts_of_all(rows, self.general, gone)


def prompts_for(rows: Iterable[Mapping]) -> list[str]:
    """The target prompts of rows, each once."""
    return list(dict.fromkeys(prompt for row in rows for prompt in row["target_prompts"]))


def begin(
    pipeline: DiffusionPipeline,
    lessons: Lessons,
    rows: Sequence[Mapping],
    settings: TrainingSettings,
    seed: int,
    preserved: Sequence[str],
) -> Training:
    """A training of some of the rows, `settings.steps` a row, that distils `preserved` if its settings say so.

    It has no null space yet: see `Kept`.
    """
    data, targets = lessons.data(rows)
    settings = replace(
        settings,
        steps=settings.steps * len(rows),
        preserve="distill" if settings.distills else "none",
    )
    return Training(pipeline, data, targets, settings, seed=seed, preserved=["", *preserved])


class Kept:
    """Prompts whose encodings' null space a change is kept in: the second moment of all that were added."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.encoder, self.count = Encoder(pipeline), 0
        self.moment: Tensor | float = 0.0

    def add(self, prompts: Sequence[str]) -> None:
        """Add prompts, each of which counts as much as any other."""
        if prompts:
            moment, count = second_moment(self.encoder.hidden(prompts)), self.count + len(prompts)
            self.moment = (self.count * self.moment + len(prompts) * moment) / count
            self.count = count

    def hold(self, training: Training, tolerance: float) -> None:
        """Let a training leave what these prompts give as the model gives it now. Raises TrainingError."""
        space = NullSpace(list(training.parameters.values()), span(self.moment, tolerance))
        if space.rank == space.basis.shape[0]:
            raise TrainingError(
                f"the {self.count} prompts that stay as they are span all {space.rank} dimensions of the text's encoding at "
                f"tolerance {tolerance}, so nothing can change; take a larger bundles.training.preserve_tolerance, or preserve distill"
            )
        training.null_space = space


class _Course:
    """The parts of a bundle's training. `records`: of all their steps."""

    def __init__(
        self,
        spec: Mapping,
        lessons: Lessons,
        pipeline: DiffusionPipeline,
        checkpoint: Path | None,
        checkpoint_steps: int,
    ) -> None:
        self.spec, self.lessons, self.pipeline = spec, lessons, pipeline
        self.checkpoint, self.checkpoint_steps = checkpoint, checkpoint_steps
        self.settings, self.kept = TrainingSettings.from_spec(spec["training"]), Kept(pipeline)
        self.preserved = lessons.preserved(lessons.rows)
        self.records: list[dict] = []

    def run(self) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Train all parts; returns the parameters as they were at first, and as they are then."""
        state, first = self._load(), None
        self.kept.add(["", *self.preserved])
        for number, part in enumerate(WAYS[self.spec["how"]].parts(self.lessons.rows)):
            if not state or number >= state["part"]:
                training = self._begin(part, state)
                first = first or dict(state["first"] if state else self.start)
                self._train(training, number, first)
                state = None
            done = prompts_for(part)
            self.preserved += done
            self.kept.add(done)
        return {
            name: value.to(training.pipeline.device) for name, value in first.items()
        }, training.parameters

    def _begin(self, part: Sequence[Mapping], state: Mapping | None) -> Training:
        """A part's training; with a checkpoint's state, where that left it."""
        if state:  # what the part preserves is taken where it began
            put(delta_parameters(self.pipeline, state["start"]), state["start"])
        options = (part, self.settings, self.spec["seed"], self.preserved)
        training = begin(self.pipeline, self.lessons, *options)
        if self.settings.projects:
            self.kept.hold(training, self.settings.preserve_tolerance)
        self.start = {name: value.detach().clone() for name, value in training.parameters.items()}
        if state:
            training.restore(state)
        return training

    def _train(self, training: Training, number: int, first: Mapping) -> None:
        """Take the steps that are left, record them, and write checkpoints."""
        steps, label = training.settings.steps, f"part {number + 1}"
        for record in progress_bar(training, desc=label, initial=training.step, total=steps, unit="step"):
            self.records.append({"part": number, **asdict(record)})
            if self.checkpoint and len(self.records) % self.checkpoint_steps == 0:
                state = {"records": self.records, "part": number, "start": self.start, "first": first}
                save_checkpoint(self.checkpoint, self.spec, training.state() | state)

    def _load(self) -> dict | None:
        """The state of a killed run, whose records are taken over."""
        state = load_checkpoint(self.checkpoint, self.spec) if self.checkpoint else None
        if state:
            self.records = list(state["records"])
            log.info("%s: going on after step %d", self.checkpoint, len(self.records))
        return state
