"""Methods that find one change of the weights: how large it should be is either left as published, or searched as a training's is.

A change of fixed size removes much from one row and little from another, so what methods left of the rest can't be compared. With
`strength: auto` validation pictures choose the scale s of the change, weights = base + s x change, by the rule of `strength`: the
smallest scale tried that removes the target and keeps anchor and neighbors. Rows of all methods then stand at equal erasure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.methods.base import Method

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

FIXED: Mapping[str, object] = {"strength": "fixed"}
STRENGTH: Mapping[str, Mapping] = {
    "strength": {
        "enum": ["fixed", "auto"],
        "description": "fixed: the change as it is; auto: the smallest of training.search.scales that removes the target and keeps the rest",
    }
}
"""What a method of this kind adds to its `defaults` and its `schema`."""


class Edited(Method):
    """A subclass sets `edit` in place of `run`; nothing of it reads pictures of the anchor."""

    uses_anchors = False
    row_fields = ("kind", "targets", "anchor", "neighbors")
    judged_fields: ClassVar[tuple[str, ...]] = ("kind", "targets", "anchor", "neighbors")
    defaults: ClassVar = FIXED
    schema: ClassVar = STRENGTH

    def fields(self, settings: Mapping) -> tuple[str, ...]:
        return self.judged_fields if self.validates(settings) else self.row_fields

    def validates(self, settings: Mapping) -> bool:
        return settings["method"].get(self.name, {}).get("strength") == "auto"

    def work(self, settings: Mapping, templates: list[str]) -> dict:
        work = super().work(settings, templates)
        if self.validates(settings):
            work["search"] = {"scales": settings["training"]["search"]["scales"]}
        return work

    def edit(
        self, spec: Mapping, pipeline: DiffusionPipeline
    ) -> tuple[dict[str, Tensor], Sequence[Mapping[str, object]]]:
        """The new values by names in a delta, and the record of the steps that led there: `step` and `seconds` of each at least.

        The pipeline is left, or put back, as it was.
        """
        raise NotImplementedError

    def run(
        self,
        spec: Mapping,
        anchors: str | Path | None,
        delta: str | Path,
        training: str | Path,
        *,
        device: str,
        checkpoint_steps: int,
    ) -> None:
        from concept_ablation.diffusion.stages import load_model

        pipeline = load_model(spec["model"], device)
        edited, records = self.edit(spec, pipeline)
        if "search" not in spec:
            self.save(spec, edited, delta, training, records)
            return
        from concept_ablation.methods.records import describe
        from concept_ablation.methods.strength import write_looks
        from concept_ablation.registries import STAGES

        found = search_scale(spec, pipeline, edited, len(records))
        chosen = found.looks[found.chosen]
        looks = Path(delta).with_name(Path(STAGES["ablate_concept"].files["strength"]).name)
        write_looks(looks, found, {**describe(spec), "settings": self.settings_of(spec)})
        more = {"strength": chosen.line() | {"reached": chosen.reached}}
        self.save(spec, found.best, delta, training, records, more)


def search_scale(spec: Mapping, pipeline: DiffusionPipeline, edited: Mapping[str, Tensor], step: int):
    """The `strength.Search` for the scale of a change: its looks, and the weights at the best of them.

    edited: new values by names in a delta. step: how many steps led there, for the table of looks. The pipeline is left at the base.
    """
    from concept_ablation.diffusion.delta import delta_parameters
    from concept_ablation.evaluation.validation import Spending, Validation
    from concept_ablation.methods.strength import Change, Search, Weights, look_at, put

    own = delta_parameters(pipeline, edited)
    weights = Weights({name: own[name] for name in edited})
    change, found = Change(weights), Search(spending=Spending(spec["validation"]["alpha"]))
    put(weights.parameters, edited)
    validation = Validation(spec, pipeline)
    validation.unchanged = functools.partial(change.at, 0.0)
    look_at(found, change, validation.look, (0, "{}", step), spec["search"]["scales"])
    change.undo()
    return found
