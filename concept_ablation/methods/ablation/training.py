"""Training: make a network predict for a target prompt what it predicts for the anchor prompt.

A step is: draw images, prompts, noise and timesteps (`draws`); encode them, predict and take the losses (`objective`,
`losses`); go backward; clip the gradient; let the optimizer and the learning rate go on.

`Training` changes a pipeline in place and yields a record after each optimizer step; whoever iterates logs, shows
progress, saves its state, or stops. All random numbers come from the generators of `draws.TrainingDraws`, on the CPU: two
runs on a CPU are equal bit for bit, also if one was stopped and went on. On a GPU the draws are the same, the roundings
needn't be.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.common.hardware import (
    Precision,
    check_precision,
    peak_memory,
    resolve_precision,
)
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.draws import TrainingDraws
from concept_ablation.methods.ablation.hardening import Hardening, joined
from concept_ablation.methods.ablation.objective import AblationObjective
from concept_ablation.methods.ablation.preservation import NullSpace, null_space
from concept_ablation.methods.ablation.settings import (
    TrainingError,
    TrainingSettings,
    make_lr_scheduler,
    make_optimizer,
)
from concept_ablation.methods.ablation.token_embeddings import TrainableTokenEmbeddings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    `loss` without other terms; `prior_loss` and `preserve_loss` before their weights (NaN if there is none), `grad_norm` before
    clipping, `seconds` of this step, `peak_memory_bytes` so far.
    """

    step: int
    loss: float
    prior_loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int
    preserve_loss: float = math.nan


class Training:
    """The training of `pipeline` on `data`, in place: iterating it takes the steps that are left.

    `targets[i]`: the target prompts that image i's is drawn from, each as likely as the others. `tokens`: by text
    encoder, the ids of the tokens that group `embedding` trains. `preserved`: the preserved prompts, if any are.
    `hardening`: what attacks it as it goes, if anything does.
    `parameters`: what is trained, named as in a delta.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        data: AnchorData,
        targets: Sequence[Sequence[str]],
        settings: TrainingSettings,
        *,
        seed: int,
        tokens: Mapping[str, Sequence[int]] | None = None,
        preserved: Sequence[str] = (),
        hardening: Hardening | None = None,
    ) -> None:
        self.pipeline, self.settings, self.step = pipeline, settings, 0
        self.family, self.hardening = family_of(pipeline), hardening
        self.network = self.family.network(pipeline)
        check_precision(self.network, settings.precision, pipeline.device)
        self.embeddings = None
        if settings.group == "embedding":
            self.embeddings = TrainableTokenEmbeddings(pipeline, tokens or {})
        self.parameters = self._trainable()
        self._accelerator = _make_accelerator(settings.precision, pipeline.device)
        optimizer = make_optimizer(list(self.parameters.values()), settings)
        self._lr_scheduler = make_lr_scheduler(optimizer, settings)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)
        self._objective = AblationObjective(pipeline, settings, self._accelerator, self.embeddings)
        self._draws = TrainingDraws(
            data,
            targets,
            settings,
            seed,
            self._objective.schedule,
            channels=self.family.latent_channels(pipeline),
            vae_factor=pipeline.vae_scale_factor,
            preserved=preserved,
            open_prompts=hardening.open_prompts if hardening else (),
        )
        self.null_space = self._null_space(preserved) if settings.projects else None

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters to train, by their names in a delta; the pipeline's others get no gradient. Raises TrainingError."""
        for part in (self.network, *self.family.encoders(self.pipeline).values()):
            part.requires_grad_(False)
        if self.embeddings is not None:
            parameters = self.embeddings.parameters
        else:
            own = self.family.trainable_parameters(self.network, self.settings.group)
            parameters = {f"{self.family.network_name}.{name}": value for name, value in own.items()}
        if not parameters:
            raise TrainingError(f"group {self.settings.group!r}: there is nothing to train")
        for parameter in parameters.values():
            parameter.data = parameter.data.float()  # large networks are held in half precision
            parameter.requires_grad_(True)
        return parameters

    def _null_space(self, preserved: Sequence[str]) -> NullSpace:
        """What keeps the preserved prompts as they are. Raises TrainingError."""
        prefix, projections = f"{self.family.network_name}.", self.family.text_projections(self.network)
        own = {name.removeprefix(prefix): value for name, value in self.parameters.items()}
        tolerance = self.settings.preserve_tolerance
        return null_space(own, projections, self._objective.encoder, preserved, tolerance)

    def __iter__(self) -> Iterator[StepRecord]:
        """Take the steps up to `settings.steps`. Raises TrainingError if the loss is no number any more."""
        detached = self.family.detach_bos(self.network)
        if self.settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        try:
            with detached if self.settings.detach_bos else contextlib.nullcontext():
                while self.step < self.settings.steps:
                    yield self._take_step()
        finally:
            self.network.disable_gradient_checkpointing()

    def _take_step(self) -> StepRecord:
        started, step = time.perf_counter(), self.step + 1
        if self.hardening and self.hardening.is_due(self.step):
            found = self.hardening.attack(self.step, list(self.parameters.values()))
            self._put_found(joined(self._objective.encoder.found, found))
        losses = self._backward()
        loss = losses["ablation"]
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}: lower the learning rate, or use fp32")
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        grad_norm = float(self._accelerator.clip_grad_norm_(self.parameters.values(), limit))
        learning_rate = self._lr_scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._lr_scheduler.step()
        self._optimizer.zero_grad()
        if self.null_space:
            self.null_space.project()
        self.write()
        self.step = step
        seconds = time.perf_counter() - started
        memory = peak_memory(self.pipeline.device)
        prior, preserve = (losses.get(name, math.nan) for name in ("prior", "preserve"))
        return StepRecord(step, loss, prior, learning_rate, grad_norm, seconds, memory, preserve)

    def _backward(self) -> dict[str, float]:
        """Gradients of one optimizer step; the mean of each loss over its batches, without its weight."""
        settings = self.settings
        weights = {"ablation": 1.0, "prior": settings.prior_weight, "preserve": settings.preserve_weight}
        means: dict[str, torch.Tensor] = {}
        for _ in range(settings.gradient_accumulation):
            # Loss by loss, so that one graph is alive at a time; their gradients add up.
            for name, loss in self._objective.losses(self._draws.next_batch()):
                share = loss / settings.gradient_accumulation
                self._accelerator.backward(weights[name] * share)
                means[name] = means.get(name, torch.zeros(())) + share.detach().cpu()
        return {name: float(value) for name, value in means.items()}

    def _put_found(self, rows: Mapping[str, Tensor]) -> None:
        """Let the target's prompts name what attacks found: text encoder -> (attacks x tokens, width)."""
        self._objective.encoder.found = dict(rows)
        self._draws.found = self.hardening.words(rows)

    def write(self) -> None:
        """Let the pipeline read `parameters`, whose values were set from outside."""
        if self.embeddings is not None:
            self.embeddings.write()

    def state(self) -> dict[str, object]:
        """All that the steps to come depend on, as a checkpoint must hold it: tensors, and what JSON can hold.

        The number of steps taken; the trained parameters; the states of the optimizer, of the learning rate's schedule
        and, in fp16, of the gradient's scaler; the state of the draws. A frozen teacher isn't in it: it is the network
        before training, which a training of the same pipeline has again.
        """
        scaler = self._accelerator.scaler
        return {
            "step": self.step,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "draws": self._draws.state(),
            **({"found": dict(self._objective.encoder.found)} if self.hardening else {}),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what `state()` gave in a training of the same pipeline, data, settings and seed."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.write()
        self._optimizer.load_state_dict(state["optimizer"])
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._draws.restore(state["draws"])
        if found := state.get("found"):
            self._put_found({name: rows.to(self.pipeline.device) for name, rows in found.items()})
        self.step = state["step"]


def _make_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is shared by a whole process and can't be changed; without this a process could train only
    # once.
    AcceleratorState._reset_state(reset_partial_state=True)
    resolved = resolve_precision(precision, device)
    return Accelerator(mixed_precision="no" if resolved == "fp32" else resolved, cpu=device.type == "cpu")
