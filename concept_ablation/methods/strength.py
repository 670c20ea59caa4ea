"""Strength: how far a training has to go, found by looking at validation pictures instead of guessed.

A training is looked at after some of its steps. It stops at the first look, so at the smallest strength, at which every target's
upper bound lies below its limit and no neighbor and not the anchor is beyond theirs. After the last step it also looks at larger
scales s of the change, weights = base + s x change, which cost no training. Where something is harmed it looks at scales between
that one and the last that removed too little. A setting that doesn't get there is followed by the next one of a ladder. If none
does, the look that comes nearest is taken: the one whose furthest value beyond any limit is the least.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.evaluation.validation import Finding, Spending

log = logging.getLogger(__name__)
HALVINGS = 2
"""Looks between a scale that removes too little and one that harms."""


class Trainable(Protocol):
    """A training that changes a pipeline's `parameters` in place, step by step."""

    parameters: Mapping[str, nn.Parameter]
    step: int

    def __iter__(self) -> Iterator:
        """Take the steps that are left."""

    def write(self) -> None:
        """Let the pipeline read `parameters`, whose values were set from outside."""


class Weights:
    """A pipeline's parameters, by their names in a delta, as a training that takes no step shows them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters, self.step = parameters, 0

    def __iter__(self) -> Iterator:
        return iter(())

    def write(self) -> None:
        """The pipeline reads these parameters themselves."""


@torch.no_grad()
def put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give those of the parameters that `values` names their values, in place."""
    for name, value in values.items():
        parameters[name].copy_(value)


@dataclass(frozen=True)
class Look:
    """A look at a training: after which step of which rung of the ladder, at which scale of the change, and what it saw."""

    rung: int
    settings: str
    step: int
    scale: float
    finding: Finding

    @property
    def reached(self) -> bool:
        """Whether the target is gone and nothing is harmed."""
        return self.finding.gone and bool(self.finding.kept)

    def line(self) -> dict:
        """The look as a line of the table, but for `chosen`."""
        own = asdict(self)
        return own | own.pop("finding")

    @classmethod
    def of(cls, line: Mapping) -> Look:
        """The look that `line()` gave."""
        found = Finding(**{name: line[name] for name in Finding.__annotations__})
        return cls(line["rung"], line["settings"], line["step"], line["scale"], found)


@dataclass
class Search:
    """All looks so far, and the weights of the best one: what a search that was stopped goes on from."""

    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    spending: Spending | None = None

    @property
    def chosen(self) -> int:
        """The number of the look whose weights are taken: the first that got there, else the nearest."""
        for number, look in enumerate(self.looks):
            if look.reached:
                return number
        return min(range(len(self.looks)), key=lambda number: self.looks[number].finding.excess)


class Change:
    """The change that a training makes to its parameters, from where it stands when this object is made."""

    def __init__(self, training: Trainable) -> None:
        self.training = training
        self.start = {name: value.detach().clone() for name, value in training.parameters.items()}

    @contextlib.contextmanager
    def at(self, scale: float) -> Iterator[dict[str, Tensor]]:
        """Inside, the pipeline has `scale` x the change; gives the parameters as they are then."""
        trained = {name: value.detach().clone() for name, value in self.training.parameters.items()}
        if scale != 1:
            self._set({name: torch.lerp(self.start[name], value, scale) for name, value in trained.items()})
        try:
            yield {name: value.detach() for name, value in self.training.parameters.items()}
        finally:
            self._set(trained)

    def undo(self) -> None:
        """Put the parameters back where they were."""
        self._set(self.start)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.training.parameters.items():
            parameter.copy_(values[name])
        self.training.write()


def look_at(
    search: Search,
    change: Change,
    judge: Callable[[Spending], Finding],
    place: tuple[int, str, int],
    scales: Sequence[float],
) -> bool:
    """Look at a training where it stands; True if its rung is at its end: it got there, or more strength would only harm more.

    place: the rung's number, its settings as JSON, the step. scales: of the change, in the order in which they are tried.
    """

    def look(scale: float) -> Look:
        with change.at(scale) as values:
            found = Look(*place, scale, judge(search.spending))
            search.looks.append(found)
            if search.chosen == len(search.looks) - 1:
                search.best = {name: value.clone() for name, value in values.items()}
        log.info("%s", describe(found))
        return found

    weak = 0.0
    for scale in scales:
        found = look(scale)
        if found.reached:
            return True
        if found.finding.kept is False:
            _between(look, weak, scale)
            return True
        weak = scale
    return False


def _between(look: Callable[[float], Look], weak: float, strong: float) -> None:
    """Look halfway, twice at most, between a scale that removes too little and one that harms."""
    for _ in range(HALVINGS):
        scale = (weak + strong) / 2
        found = look(scale)
        if found.reached:
            return
        if found.finding.kept is False:
            strong = scale
        else:
            weak = scale


def describe(look: Look) -> str:
    """A look in a line of a log."""
    found = look.finding
    harm = "" if found.kept is None else f"; {'kept' if found.kept else 'harmed'}"
    return (
        f"step {look.step} x {look.scale:g} of {look.settings}: {found.target} in {found.target_share:.0%} "
        f"(limit {found.target_limit:.0%}, {'gone' if found.gone else 'not shown to be gone'}){harm}"
    )


TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
PLACE = {"rung": "int", "settings": "str", "step": "int", "scale": "float"}
COLUMNS = pa.schema(
    [
        (name, TYPES[kind.partition(" ")[0]])
        for name, kind in (PLACE | Finding.__annotations__ | {"chosen": "bool"}).items()
    ]
)
"""Where a look was made, what it found, and whether its weights were taken."""


def write_looks(path: str | Path, search: Search, metadata: Mapping[str, object]) -> None:
    """Write a line a look, none where the strength was fixed; `metadata` as JSON in it."""
    lines = [look.line() | {"chosen": number == search.chosen} for number, look in enumerate(search.looks)]
    table = pa.Table.from_pylist([{name: line[name] for name in COLUMNS.names} for line in lines], COLUMNS)
    about = json.dumps(metadata, sort_keys=True)
    with atomic_output(path) as part:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: about}), part)
