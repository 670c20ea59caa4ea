"""Hardening: while a training goes on, its model is attacked, and what brought the target back is trained on, too.

After every k steps the attack `soft-prompt` learns token embeddings against the weights as they are, from pictures of the target that
the unchanged model drew. From then on a prompt with these embeddings in the target's place is one of the target's prompts: its
prediction is moved to the anchor's. STEREO (Srivatsan et al., 2025) and AdvUnlearn (Zhang et al., 2024) train against attacks in such
rounds. A null space holds for every step, whatever prompt it was for. What of a learned prompt's encoding lies in the preserved span
can't be moved, which is why a hardened training preserves a smaller one (`harden.preserve_tolerance`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.placeholders import add_placeholders
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.evaluation.attacks.base import Goal
from concept_ablation.registries import ATTACKS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

ATTACK = "soft-prompt"
TOGETHER = 16
"""Pictures drawn at once."""
log = logging.getLogger(__name__)


class Hardening:
    """The attacks on one row's training; make it while the pipeline is the unchanged model, which draws the pictures to bring back.

    Targets take turns, an attack each. Nothing of the pipeline is changed.

    Args:
        settings: every (steps between attacks), images (pictures of each target), sampler (of these), seed (of the first picture,
            and of the attacks' draws), and the attack's budget: tokens, steps, batch_size, learning_rate.
        asked: target -> the prompts that its pictures are drawn with, in turn.
        open_prompts: for each image of the training, the prompts with `roles.MARK` in the target's place. Image i of a target's
            pictures is to come back under a prompt of entry i, modulo their number.
        precision: of the attacks' computation.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        settings: Mapping,
        asked: Mapping[str, Sequence[str]],
        open_prompts: Sequence[Sequence[str]],
        precision: str = "auto",
    ) -> None:
        self.pipeline, self.settings, self.open_prompts = pipeline, settings, open_prompts
        self.goals = {
            target: self._goal(number * settings["images"], prompts, precision)
            for number, (target, prompts) in enumerate(asked.items())
        }

    def _goal(self, first: int, prompts: Sequence[str], precision: str) -> Goal:
        """What the attacks on one target aim at. first: the number of its first picture among all targets'."""
        numbers = range(self.settings["images"])
        seeds = [self.settings["seed"] + first + i for i in numbers]
        own = [prompts[i % len(prompts)] for i in numbers]
        options = {
            "sampler": self.settings["sampler"],
            "batch_size": TOGETHER,
            "progress": "hardening, pictures of the target",
        }
        pictures = list(sample_images(self.pipeline, own, seeds, **options))
        marked = in_turn(self.open_prompts)
        marked = [marked[i % len(marked)] for i in numbers]
        return Goal(self.pipeline, pictures, marked, precision)

    def is_due(self, step: int) -> bool:
        """Whether an attack comes between `step` and the next one."""
        return step > 0 and step % self.settings["every"] == 0

    def attack(self, step: int, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
        """What brings a target back after `step`: text encoder -> (tokens, width). parameters: those in training, which stay as they are.

        The draws depend on the step alone, so a training that goes on from a checkpoint is attacked as one that never stopped.
        """
        targets = list(self.goals)
        target = targets[(step // self.settings["every"] - 1) % len(targets)]
        goal = self.goals[target]
        goal.generator = torch.Generator().manual_seed(self.settings["seed"] + step)
        with _held(parameters):
            learned = ATTACKS[ATTACK].learn(goal, target, self.settings)
        log.info("attack on %r after step %d: loss %.4f -> %.4f", target, step, *_ends(learned.losses))
        return dict(learned.rows)

    def words(self, rows: Mapping[str, Tensor]) -> list[str]:
        """For each attack the text that stands for what it found, where `rows` are the embeddings of all, one attack after the other."""
        count, tokens = len(next(iter(rows.values()))), self.settings["tokens"]
        names = add_placeholders(self.pipeline, count).split(" ")
        return [" ".join(names[first : first + tokens]) for first in range(0, count, tokens)]


def joined(before: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text encoder -> the embeddings of earlier attacks, if any, and those of a new one after them."""
    return {name: torch.cat([before[name], rows]) if name in before else rows for name, rows in new.items()}


def in_turn(prompts: Sequence[Sequence[str]]) -> list[str]:
    """One prompt of each image: its first, second, ... where images have several, in turn."""
    return [own[place % len(own)] for place, own in enumerate(prompts)]


@contextlib.contextmanager
def _held(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these get no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _ends(losses: Sequence[float], share: int = 4) -> tuple[float, float]:
    """The mean of the first and of the last quarter of an attack's losses, at least one each."""
    part = max(1, len(losses) // share)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part
