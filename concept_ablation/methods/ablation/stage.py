"""Stage `ablate_concept`: train on the anchor's images, write the delta and the record of the steps."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from concept_ablation.common.hardware import resolve_precision
from concept_ablation.common.image_store import read_store
from concept_ablation.common.progress import progress_bar
from concept_ablation.common.roles import MARK
from concept_ablation.diffusion.delta import save_delta
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.stages import load_model
from concept_ablation.evaluation.validation import Spending, Validation
from concept_ablation.methods.ablation.checkpoints import load_checkpoint, save_checkpoint
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.hardening import Hardening, in_turn
from concept_ablation.methods.ablation.preservation import preserved_prompts
from concept_ablation.methods.ablation.settings import TrainingError, TrainingSettings, renamed
from concept_ablation.methods.ablation.token_embeddings import target_tokens
from concept_ablation.methods.ablation.training import Training
from concept_ablation.methods.concept_editing import DEFAULTS as UCE
from concept_ablation.methods.concept_editing import edit, encodings, projections
from concept_ablation.methods.records import describe, write_records
from concept_ablation.methods.strength import Change, Look, Search, look_at, put, write_looks
from concept_ablation.registries import KINDS, STAGES

log = logging.getLogger(__name__)


def ablate_concept(
    spec: Mapping,
    anchors_path: str | Path,
    delta_path: str | Path,
    training_path: str | Path,
    *,
    device: str = "auto",
    checkpoint_path: str | Path | None = None,
    checkpoint_steps: int = 0,
) -> None:
    """Stage `ablate_concept`: train on the anchor's images, write the delta and the tables of steps and of looks.

    Every `checkpoint_steps` steps (0: never), and after each look, a checkpoint is written to `checkpoint_path`, from which a
    killed run goes on; it is removed at the end. Raises TrainingError, StoreError, ModelError, PromptsError, FeatureError.
    """
    checkpoint = Path(checkpoint_path) if checkpoint_path is not None and checkpoint_steps else None
    run, more = _Run(spec, anchors_path, device, checkpoint, checkpoint_steps), {}
    if "search" in spec:
        parameters, chosen = run.search(), run.found.looks[run.found.chosen]
        rung, more = json.loads(chosen.settings), {"strength": chosen.line() | {"reached": chosen.reached}}
    else:
        rung, parameters = {}, run.train(run.begin({}))
    metadata = run.describe(rung) | more
    write_records(training_path, run.records, metadata)
    if "search" in spec:
        looks = Path(delta_path).with_name(Path(STAGES["ablate_concept"].files["strength"]).name)
        write_looks(looks, run.found, metadata)
    save_delta(delta_path, parameters, metadata)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    log.info("trained %d tensors in %d steps: %s", len(parameters), len(run.records), delta_path)


class _Run:
    """The trainings of one row: one, or one a rung of the ladder. `records`: of the steps of all; `found`: the looks at them."""

    def __init__(
        self,
        spec: Mapping,
        anchors_path: str | Path,
        device: str,
        checkpoint: Path | None,
        checkpoint_steps: int,
    ) -> None:
        self.spec, self.checkpoint, self.checkpoint_steps = spec, checkpoint, checkpoint_steps
        self.pipeline = load_model(spec["model"], device)
        self.tokenizers = family_of(self.pipeline).tokenizers(self.pipeline)
        self.data = AnchorData.from_store(anchors_path)
        self.targets = target_prompts(spec, self.data, anchors_path)
        self.hardening = self._hardening(anchors_path) if "harden" in spec else None
        self.records: list[dict] = []
        self.found = Search()

    def settings(self, rung: Mapping) -> TrainingSettings:
        """The row's settings, with those of a rung of the ladder in their place."""
        return TrainingSettings.from_spec({**self.spec["training"], **renamed(rung)})

    def tokens(self, settings: TrainingSettings) -> dict[str, list[int]]:
        """By text encoder, the ids of the tokens whose embeddings are trained, if they are."""
        if settings.group != "embedding":
            return {}
        words = self.spec["targets"], self.spec["anchor"]
        return {name: target_tokens(tokenizer, *words) for name, tokenizer in self.tokenizers.items()}

    def begin(self, rung: Mapping) -> Training:
        """A training of the pipeline as it is, with the row's settings and those of a rung."""
        settings = self.settings(rung)
        preserved = self._preserved() if settings.preserves else ()
        options = {"seed": self.spec["seed"], "tokens": self.tokens(settings), "preserved": preserved}
        return Training(self.pipeline, self.data, self.targets, settings, hardening=self.hardening, **options)

    def _hardening(self, anchors_path: str | Path) -> Hardening:
        """What attacks the trainings. Made before the first of them, since the unchanged model draws what is to come back."""

        def worded(word: str) -> list[tuple[str, ...]]:
            return target_prompts({**self.spec, "targets": [word]}, self.data, anchors_path)

        asked = {target: in_turn(worded(target)) for target in self.spec["targets"]}
        searched = KINDS[self.spec["kind"]].searches_prompts
        marked = [(MARK,)] * len(self.data.prompts) if searched else worded(MARK)
        precision = self.spec["training"]["precision"]
        return Hardening(self.pipeline, self.spec["harden"], asked, marked, precision)

    def _warm(self, training: Training) -> None:
        """Put the training where `training.start` says. What it preserves, and what scales of its change start from, stays the base."""
        if self.spec["training"].get("start", "none") != "uce":
            return
        pairs, kept = encodings(self.spec, self.pipeline, UCE["templates"], UCE["tokens"])
        scales = UCE["erase_scale"], UCE["preserve_scale"], UCE["ridge"]
        put(training.parameters, {n: edit(w, pairs, kept, *scales) for n, w in projections(self.pipeline).items()})  # fmt: skip
        if training.null_space:
            training.null_space.project()

    def _preserved(self) -> list[str]:
        """The row's preserved prompts; those of all rows of its bundles where these share them."""
        if "shared" in self.spec:
            return list(self.spec["shared"])
        return preserved_prompts(self.spec, self.data.prompts)

    def describe(self, rung: Mapping) -> dict[str, object]:
        """A delta's metadata: what was removed from which model, and how."""
        settings, device = self.settings(rung), self.pipeline.device
        found = {
            **describe(self.spec),
            "group": settings.group,
            "settings": {**self.spec["training"], **renamed(rung)},
            "scale_lr": settings.scale_lr,
            "scaled_learning_rate": settings.scaled_learning_rate,
            "device": device.type,
            "precision": resolve_precision(settings.precision, device),
            **({"harden": self.spec["harden"]} if self.hardening else {}),
        }
        if tokens := self.tokens(settings):
            words = [self.tokenizers[encoder].convert_ids_to_tokens(ids) for encoder, ids in tokens.items()]
            found["tokens"] = list(itertools.chain(*words))
        return found

    def train(self, training: Training) -> Mapping[str, Tensor]:
        """All steps of a training of fixed strength."""
        self._warm(training)
        if state := self._load():
            training.restore(state)
        for _ in self._steps(training):
            pass
        return training.parameters

    def search(self) -> Mapping[str, Tensor]:
        """The trainings of the ladder up to the first that is strong enough; the best look's parameters."""
        search, state = self.spec["search"], self._load()
        validation = Validation(self.spec, self.pipeline)
        self.found.spending = Spending(self.spec["validation"]["alpha"], state["tests"] if state else 0)
        tried: list[TrainingSettings] = []
        for number, rung in enumerate(search["ladder"]):
            settings = self.settings(rung).in_effect
            if settings in tried:
                continue
            tried.append(settings)
            if state and number < state["rung"]:
                continue
            training = self.begin(rung)
            change, place = Change(training), (number, json.dumps(rung, sort_keys=True))
            self._warm(training)  # after the change's base is known, which is the unchanged model's
            validation.unchanged = functools.partial(change.at, 0.0)
            if state:
                training.restore(state)
            if self._climb(training, change, validation, place, state):
                break
            change.undo()
            state = None
        return self.found.best

    def _climb(
        self,
        training: Training,
        change: Change,
        validation: Validation,
        place: tuple[int, str],
        state: Mapping | None,
    ) -> bool:
        """The steps of one rung, with its looks; whether it got there."""
        looks = {step for step in self.spec["search"]["looks"] if step < training.settings.steps}
        looks.add(training.settings.steps)
        scales = self.spec["search"]["scales"]

        def ends_at(step: int) -> bool:
            # Further steps make the target's pictures like the anchor's; a larger change only pushes them away.
            tried = scales if step == training.settings.steps else [scale for scale in scales if scale <= 1]
            ended = look_at(self.found, change, validation.look, (*place, step), tried)
            self._save(training, place[0], looked=True, ended=ended)
            return ended

        ended = bool(state and state["ended"])
        if not ended and training.step in looks and not (state and state["looked"]):
            # At step 0, or at one after which the run was killed before it looked.
            ended = ends_at(training.step)
        if not ended:
            any(step in looks and ends_at(step) for step in self._steps(training, place[0]))
        return any(look.reached for look in self.found.looks)

    def _steps(self, training: Training, rung: int = 0) -> Iterator[int]:
        """Take the steps that are left, record them, and write checkpoints."""
        label = f"{'; '.join(self.spec['targets'])} -> {self.spec['anchor']}"
        steps = training.settings.steps
        for record in progress_bar(training, desc=label, initial=training.step, total=steps, unit="step"):
            line = asdict(record)
            if not training.settings.distills:
                del line["preserve_loss"]
            self.records.append(line | ({"rung": rung} if "search" in self.spec else {}))
            if self.checkpoint and record.step % self.checkpoint_steps == 0 and record.step < steps:
                self._save(training, rung)
            yield record.step

    def _save(self, training: Training, rung: int, looked: bool = False, ended: bool = False) -> None:
        if not self.checkpoint:
            return
        state = training.state() | {"records": self.records}
        if "search" in self.spec:
            looks = [look.line() for look in self.found.looks]
            state |= {"rung": rung, "looks": looks, "best": self.found.best}
            state |= {"looked": looked, "ended": ended, "tests": self.found.spending.used}
        save_checkpoint(self.checkpoint, self.spec, state)

    def _load(self) -> dict | None:
        """The state of a killed run, whose records and looks are taken over."""
        state = load_checkpoint(self.checkpoint, self.spec) if self.checkpoint else None
        if state:
            self.records = list(state["records"])
            self.found.looks = [Look.of(line) for line in state.get("looks", [])]
            self.found.best = dict(state.get("best", {}))
            log.info("%s: going on after step %d", self.checkpoint, state["step"])
        return state


def target_prompts(spec: Mapping, data: AnchorData, anchors_path: str | Path) -> list[tuple[str, ...]]:
    """Each image's target prompts: made from its own, or those that were searched for, the same for all."""
    kind = KINDS[spec["kind"]]
    if kind.searches_prompts:
        searched = read_store(anchors_path).metadata.get("target_prompts")
        if not searched:
            raise TrainingError(f"{anchors_path}: no target_prompts in its metadata; make the images again")
        return [tuple(searched)] * len(data.prompts)
    templates = spec["training"]["style_templates"]
    return kind.target_prompts(data.prompts, spec["targets"], spec["anchor"], templates)
