"""One row of the table, as it is planned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Short names of columns that replace one value of the config for one row. Every other value of SECTIONS has its
# dotted path as a column, such as `training.hflip`.
OVERRIDES = {
    "method": "method.name",
    "parameter_group": "training.parameter_group",
    "steps": "training.steps",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
}
# The sections of the config that a row, a kind and a preset may change. The others are the same for the whole table.
SECTIONS = ("prompts", "anchors", "method", "training", "evaluation")


@dataclass(frozen=True)
class Concept:
    """One row: remove `targets`, so that they become `anchor`, and keep `neighbors` as they are.

    `synonyms`: other words for the targets, which are tried on the finished model;
    `prompts`: the path of a file of anchor prompts; `image`: that of the memorized picture; `delta`: that of a delta
    made elsewhere, which is judged instead of training one; `preset`: one of the config's; `bundles`: those that it is part
    of; `overrides`: dotted config key -> value; `line`: its line in the table, from 1; `enabled`: false if the row is switched off.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    anchor: str
    neighbors: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    prompts: str | None = None
    image: str | None = None
    delta: str | None = None
    preset: str | None = None
    bundles: tuple[str, ...] = ()
    overrides: Mapping[str, object] = field(default_factory=dict)
    line: int = 0
    enabled: bool = True

    @property
    def target(self) -> str:
        """The targets as one text, separated by `; `."""
        return "; ".join(self.targets)


def slug(text: str, length: int = 40) -> str:
    """`text` as part of a file name: lower-case letters, digits and single hyphens, at most `length` characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-") or "x"
