"""Method `uce`: Unified Concept Editing (Gandikota et al., WACV 2024), keys and values of the text edited in closed form.

No picture is drawn and nothing is trained. `concept_editing` has the formula.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.common.needs import Need
from concept_ablation.methods.concept_editing import DEFAULTS, SCHEMA
from concept_ablation.methods.edited import FIXED, STRENGTH, Edited

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor


class Uce(Edited):
    """Its defaults are those of the published code; preserved are the row's anchor and its neighbors."""

    name = "uce"
    defaults: ClassVar = {**FIXED, **DEFAULTS}
    schema: ClassVar = {**STRENGTH, **SCHEMA}

    def groups(self, settings: Mapping) -> set[str]:
        return {"cross-attn"}

    def needs(self, settings: Mapping) -> dict[Need, str]:
        return {"text-projections": f"method {self.name}"}

    def edit(self, spec: Mapping, pipeline: DiffusionPipeline) -> tuple[dict[str, Tensor], list[dict]]:
        from concept_ablation.methods.concept_editing import edit, encodings, projections

        started, settings = time.perf_counter(), self.settings_of(spec)
        pairs, kept = encodings(spec, pipeline, settings["templates"], settings["tokens"])
        scales = settings["erase_scale"], settings["preserve_scale"], settings["ridge"]
        edited = {name: edit(weight, pairs, kept, *scales) for name, weight in projections(pipeline).items()}
        return edited, [{"step": 1, "seconds": time.perf_counter() - started}]


METHOD = Uce()
