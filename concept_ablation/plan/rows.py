"""Rows and bundles as a plan has them: the keys of their work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from concept_ablation.plan.concept import Concept
from concept_ablation.plan.victims import Interference


@dataclass(frozen=True)
class Row:
    """The keys of one concept's work. `base` maps each probe's subject to the key of the base model's pictures.

    `ablation` is the key of a training, or of an imported delta, for which `anchors` is None. `interference`: None where nothing is
    measured on other rows' subjects. `attacks`: the keys of what tries to bring the target back.
    """

    concept: Concept
    anchors: str | None
    ablation: str
    samples: str
    scores: str
    base: Mapping[str, str]
    interference: Interference | None = None
    attacks: tuple[str, ...] = ()

    @property
    def last(self) -> list[str]:
        """The keys of the work that is made last and stands for all other."""
        return [self.scores, *([self.interference.key] if self.interference else ()), *self.attacks]


@dataclass(frozen=True)
class Bundle:
    """A model without all concepts of several rows: how it is made, the key of the result, and their names.

    `judged`: the rows once more, under this model; a neighbor that another of them removes is left out. Empty if it isn't judged.
    `anchors_gone`: a row whose anchor another one removes -> that one's name. `general`: the key of its general quality.
    """

    name: str
    how: str
    delta: str
    concepts: tuple[str, ...]
    judged: tuple[Row, ...] = ()
    anchors_gone: Mapping[str, str] = field(default_factory=dict)
    general: str | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """The keys of the work that all else is done for."""
        return (self.delta, *(row.scores for row in self.judged), *([self.general] if self.general else []))
