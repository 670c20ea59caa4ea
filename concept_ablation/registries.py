"""The vocabularies that grow: kinds, methods, metrics, families and stages. A new word is a new file and a line here.

An entry is named as `module:attribute` and loaded when it is first asked for, so that this table costs nothing to import and
planning loads no torch. No name from a config or a table is ever imported: what isn't listed here doesn't exist.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from concept_ablation.common.errors import UserError, did_you_mean, show


class UnknownNameError(UserError):
    """A word that a registry doesn't have; the message lists those that it has."""


class Registry(Mapping[str, Any]):
    """Name -> entry, in the order in which they are listed. `noun`: what an entry is, for messages."""

    def __init__(self, noun: str, targets: Mapping[str, str]) -> None:
        self.noun, self.targets = noun, dict(targets)
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The entry called `name`. Raises UnknownNameError."""
        if name not in self.targets:
            allowed = ", ".join(self.targets)
            raise UnknownNameError(
                f"{self.noun} {show(name)} is unknown{did_you_mean(name, self.targets)} (allowed: {allowed})"
            )
        if name not in self._loaded:
            module, _, attribute = self.targets[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __contains__(self, name: object) -> bool:
        return name in self.targets


KINDS = Registry(
    "kind",
    {
        "style": "concept_ablation.kinds.style:KIND",
        "object": "concept_ablation.kinds.object:KIND",
        "memorization": "concept_ablation.kinds.memorization:KIND",
        "nudity": "concept_ablation.kinds.nudity:KIND",
        "inappropriate": "concept_ablation.kinds.inappropriate:KIND",
    },
)
"""What a concept can be: how it is asked for, judged and shown. An entry is a `concept_ablation.kinds.base.Kind`."""

METHODS = Registry("method", {"ablation": "concept_ablation.methods.ablation.method:METHOD"})
"""How a concept is removed. An entry is a `concept_ablation.methods.base.Method`."""

METRICS = Registry(
    "metric",
    {
        "clip_accuracy": "concept_ablation.evaluation.metrics.clip_accuracy:METRIC",
        "recognition": "concept_ablation.evaluation.metrics.recognition:METRIC",
        "content": "concept_ablation.evaluation.metrics.content:METRIC",
        "copy_rate": "concept_ablation.evaluation.metrics.copy_rate:METRIC",
        "copy_similarity": "concept_ablation.evaluation.metrics.copy_similarity:METRIC",
        "detected": "concept_ablation.evaluation.metrics.detected:METRIC",
        "typical": "concept_ablation.evaluation.metrics.typical:METRIC",
        "clip_cosine": "concept_ablation.evaluation.metrics.clip_cosine:METRIC",
        "clip_score_2_5": "concept_ablation.evaluation.metrics.clip_score_2_5:METRIC",
        "image_similarity": "concept_ablation.evaluation.metrics.image_similarity:METRIC",
        "kid_x1000": "concept_ablation.evaluation.metrics.kid_x1000:METRIC",
        "neutral_share": "concept_ablation.evaluation.metrics.neutral_share:METRIC",
        "above_neutral": "concept_ablation.evaluation.metrics.above_neutral:METRIC",
    },
)
"""What is measured, in the order of the tables. An entry is a `concept_ablation.evaluation.metrics.base.Metric`."""

FAMILIES = Registry("family", {})
"""Models of one architecture, by the class of their pipeline. An entry is a `concept_ablation.diffusion.families.base.Family`."""
