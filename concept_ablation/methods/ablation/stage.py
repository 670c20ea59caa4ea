"""Stage `ablate_concept`: train on the anchor's images, write the delta and the record of the steps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from concept_ablation.common.hardware import resolve_precision
from concept_ablation.common.image_store import read_store
from concept_ablation.common.logs import progress_bar
from concept_ablation.diffusion.delta import save_delta
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.stages import load_model
from concept_ablation.methods.ablation.checkpoints import load_checkpoint, save_checkpoint
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.settings import TrainingError, TrainingSettings
from concept_ablation.methods.ablation.token_embeddings import target_tokens
from concept_ablation.methods.ablation.training import StepRecord, Training
from concept_ablation.methods.records import describe, write_records
from concept_ablation.registries import KINDS

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
    """Stage `ablate_concept`: train on the anchor's images, write the delta and the table of steps.

    Every `checkpoint_steps` steps (0: never) a checkpoint is written to `checkpoint_path`, from which a killed
    run goes on; it is removed at the end. Raises TrainingError, StoreError, ModelError, PromptsError.
    """
    model = spec["model"]
    pipeline = load_model(model, device)
    settings, data = TrainingSettings.from_spec(spec["training"]), AnchorData.from_store(anchors_path)
    targets, tokens = _target_prompts(spec, data, anchors_path), {}
    tokenizers = family_of(pipeline).tokenizers(pipeline)
    if settings.group == "embedding":
        tokens = {
            encoder: target_tokens(tokenizer, spec["targets"], spec["anchor"])
            for encoder, tokenizer in tokenizers.items()
        }
    training = Training(pipeline, data, targets, settings, seed=spec["seed"], tokens=tokens)
    checkpoint = Path(checkpoint_path) if checkpoint_path is not None and checkpoint_steps else None
    records = _train(training, spec, checkpoint, checkpoint_steps)
    metadata = _describe(spec, settings, pipeline.device)
    if tokens:
        words = [tokenizers[encoder].convert_ids_to_tokens(ids) for encoder, ids in tokens.items()]
        metadata["tokens"] = list(itertools.chain(*words))
    write_records(training_path, [asdict(record) for record in records], metadata)
    save_delta(delta_path, training.parameters, metadata)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    log.info("trained %d tensors in %d steps: %s", len(training.parameters), len(records), delta_path)


def _target_prompts(spec: Mapping, data: AnchorData, anchors_path: str | Path) -> list[tuple[str, ...]]:
    """Each image's target prompts: made from its own, or those that were searched for, the same for all."""
    kind = KINDS[spec["kind"]]
    if kind.searches_prompts:
        searched = read_store(anchors_path).metadata.get("target_prompts")
        if not searched:
            raise TrainingError(f"{anchors_path}: no target_prompts in its metadata; make the images again")
        return [tuple(searched)] * len(data.prompts)
    templates = spec["training"]["style_templates"]
    return kind.target_prompts(data.prompts, spec["targets"], spec["anchor"], templates)


def _train(
    training: Training, spec: Mapping, checkpoint: Path | None, checkpoint_steps: int
) -> list[StepRecord]:
    """All steps of a training, those before `checkpoint` among them."""
    records: list[StepRecord] = []
    state = load_checkpoint(checkpoint, spec) if checkpoint else None
    if state:
        records = [StepRecord(**record) for record in state["records"]]
        training.restore(state)
        log.info("%s: going on after step %d", checkpoint, training.step)
    label, steps = f"{'; '.join(spec['targets'])} -> {spec['anchor']}", training.settings.steps
    for record in progress_bar(training, desc=label, initial=training.step, total=steps, unit="step"):
        records.append(record)
        if checkpoint and record.step % checkpoint_steps == 0 and record.step < steps:
            done = {"records": [asdict(record) for record in records]}
            save_checkpoint(checkpoint, spec, training.state() | done)
    return records


def _describe(spec: Mapping, settings: TrainingSettings, device: torch.device) -> dict[str, object]:
    """A delta's metadata: what was removed from which model, and how."""
    return {
        **describe(spec),
        "group": settings.group,
        "settings": spec["training"],
        "scale_lr": settings.scale_lr,
        "scaled_learning_rate": settings.scaled_learning_rate,
        "device": device.type,
        "precision": resolve_precision(settings.precision, device),
    }
