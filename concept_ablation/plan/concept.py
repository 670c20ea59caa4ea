"""One row of the table, as the plan knows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Short names of columns that replace one value of the config for one row. Any other value of these sections has
# its dotted path as a column, such as `training.hflip`.
OVERRIDES = {
    "method": "method.name",
    "parameter_group": "training.parameter_group",
    "steps": "training.steps",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
}
# What a row, a kind and a preset may replace; all else of the config is the same for the whole table.
SECTIONS = ("prompts", "anchors", "method", "training", "evaluation")


@dataclass(frozen=True)
class Concept:
    """One row: remove `targets`, so that they become `anchor`, and keep `neighbors` as they are.

    `prompts`: a file of anchor prompts; `image`: the memorized picture; `delta`: a result made elsewhere, to be
    judged; `preset`: a preset of the config; `overrides`: dotted config key -> value; `enabled`: not switched off.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    anchor: str
    neighbors: tuple[str, ...] = ()
    prompts: str | None = None
    image: str | None = None
    delta: str | None = None
    preset: str | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    line: int = 0
    enabled: bool = True

    @property
    def target(self) -> str:
        """The targets as one text."""
        return "; ".join(self.targets)


def slug(text: str, length: int = 40) -> str:
    """`text` as a piece of a file name: lower-case letters, digits and single hyphens, at most `length`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-") or "x"
