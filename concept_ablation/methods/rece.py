"""Method `rece`: RECE (Gong et al., ECCV 2024), Concept Editing (`uce`) and then, again and again, an edit of what revives the target.

After an edit the projections W_i of the text, keys and values of all layers, may still give what they once gave for a target's token c,
if they are asked with another encoding. That one is found in closed form, with the unchanged weights V_i:

    c' = argmin sum_i |W_i c' - V_i c|^2 + l |c'|^2 = (l I + sum_i W_i^T W_i)^-1 sum_i W_i^T V_i c

l is `regularization`. c' is then erased as c was: the edit of `uce` from the weights as they are, towards the anchor's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.common.needs import Need
from concept_ablation.methods.concept_editing import SCALE, TEMPLATES
from concept_ablation.methods.edited import FIXED, STRENGTH, Edited

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor


class Rece(Edited):
    """Its defaults are those of the published script; preserved are the row's anchor and its neighbors."""

    name = "rece"
    defaults: ClassVar = {
        **FIXED,
        "templates": ["{}"],
        "tokens": "rest",
        "rounds": 3,
        "erase_scale": 1.0,
        "preserve_scale": 0.1,
        "ridge": 0.1,
        "regularization": 0.1,
    }
    schema: ClassVar = {
        **STRENGTH,
        "templates": TEMPLATES,
        "tokens": {
            "enum": ["last", "rest"],
            "description": "the subject's last token, or it and all after it",
        },
        "rounds": {
            "type": "integer",
            "minimum": 0,
            "description": "edits of what revives the target, 0: uce",
        },
        "erase_scale": {**SCALE, "description": "s_e of each edit, above 0"},
        "preserve_scale": {**SCALE, "description": "s_p of each edit, above 0"},
        "ridge": {
            **SCALE,
            "description": "lambda of each edit, above 0: how much the weights stay as they are",
        },
        "regularization": {**SCALE, "description": "l, above 0: how short the reviving encoding is"},
    }

    def groups(self, settings: Mapping) -> set[str]:
        return {"cross-attn"}

    def needs(self, settings: Mapping) -> dict[Need, str]:
        return {"text-projections": f"method {self.name}"}

    def edit(self, spec: Mapping, pipeline: DiffusionPipeline) -> tuple[dict[str, Tensor], list[dict]]:
        from concept_ablation.methods.concept_editing import edit, encodings, projections

        settings, started = self.settings_of(spec), time.perf_counter()
        pairs, kept = encodings(spec, pipeline, settings["templates"], settings["tokens"])
        scales = settings["erase_scale"], settings["preserve_scale"], settings["ridge"]
        first = projections(pipeline)
        weights, asked, records = first, pairs, []
        for number in range(settings["rounds"] + 1):
            if number:
                moved = reviving(list(weights.values()), list(first.values()), settings["regularization"])
                asked = [(target.double() @ moved.T, anchor) for target, anchor in pairs]
            weights = {name: edit(weight, asked, kept, *scales) for name, weight in weights.items()}
            now = time.perf_counter()
            records.append({"step": number + 1, "seconds": now - started})
            started = now
        return weights, records


def reviving(edited: list[Tensor], first: list[Tensor], regularization: float) -> Tensor:
    """(width, width), float64: the matrix that takes c to c', as this module's formula has it.

    edited, first: the projections' weights, (out, width) each, as they are and as they were, in one order.
    """
    import torch

    width = edited[0].shape[1]
    system = regularization * torch.eye(width, dtype=torch.float64, device=edited[0].device)
    wanted = torch.zeros_like(system)
    for now, before in zip((one.double() for one in edited), (one.double() for one in first), strict=True):
        system += now.T @ now
        wanted += now.T @ before
    return torch.linalg.solve(system, wanted)


METHOD = Rece()
