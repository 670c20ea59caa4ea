"""One training of several rows, as `joint`, `sequential` and `repair` make it: its settings, and what it can't do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from concept_ablation.common.errors import show
from concept_ablation.registries import METHODS

METHOD = "ablation"
"""The method whose training it is."""
UNUSED = ("search", "start", "strength", "preserve_prompts", "harden")
"""Settings of a row's training that a bundle's doesn't use, or takes from each row."""


def training_of(row: Any, settings: Mapping) -> dict:
    """A row's settings of `training` as its bundle's training uses them: those of the bundle replace the row's own."""
    own = {**row.own["training"], **settings["training"]}
    return {name: value for name, value in own.items() if name not in UNUSED}


def training_work(rows: Sequence[Any], settings: Mapping) -> dict:
    """The training's part of a spec: its settings and its seed, which all rows share."""
    training = training_of(rows[0], settings)
    training["group"], seed = training.pop("parameter_group"), training.pop("seed")
    return {"training": training, "seed": seed}


def training_mistakes(rows: Sequence[Any], settings: Mapping, what: str) -> Iterator[tuple[int, str]]:
    """Line and text of each row that can't take part in one training of all. what: wants to train, such as `how joint`."""
    rows = sorted(rows, key=lambda row: row.concept.line)
    first = rows[0]
    for row in rows:
        concept, training = row.concept, training_of(row, settings)
        method, group = row.own["method"]["name"], training["parameter_group"]
        own = {**row.own, "training": {**row.own["training"], **training, "strength": "fixed"}}
        if concept.delta:
            yield (
                concept.line,
                f"{what} trains on a row's anchor pictures, and this row brings its delta (allowed: rows without one)",
            )
        elif method != METHOD:
            yield concept.line, f"{what} trains as method {METHOD} does, and this row's method is {method}"
        elif group == "embedding":
            text = f"{what} trains weights, and this row's training.parameter_group is embedding (allowed: cross-attn, attn, full-weight)"
            yield concept.line, text
        elif row.own["training"]["harden"]["every"]:
            text = (
                f"{what} attacks no model, and this row is hardened (allowed: training.harden.every 0; or to merge the rows' own deltas, "
                "as how closed-form does)"
            )
            yield concept.line, text
        elif wrong := METHODS[METHOD].mistake(own):
            yield concept.line, f"{what}: {wrong}"
        else:
            theirs = training_of(first, settings)
            other = sorted(name for name in training if training[name] != theirs.get(name))
            if other:
                here, there = (show(one.get(other[0])) for one in (training, theirs))
                text = (
                    f"{what} has one training, and training.{other[0]} is {here} here and {there} in line {first.concept.line} "
                    f"(allowed: one value; or set bundles.training.{other[0]})"
                )
                yield concept.line, text
