"""Method `speed`: SPEED (Li et al., ICLR 2026), an edit in closed form within the null space of what is preserved.

Of a projection W, (out, width), a change D is sought that lies in the null space of preserved encodings and leaves begin-of-text and
the shape of the empty prompt exactly as they are. With the projector P on that null space, encodings c of targets, c* of the anchor,
and columns K of what stays exactly, it is the least of

    mean |(W + D) c - W c*|^2 + s |D|^2    with  D = D P  and  D K = 0
    D = R G - R G K (K^T G K)^-1 K^T G,    R = W mean (c* - c) c^T,    G = P (P C P + s I)^-1 P,    C = mean c c^T

P has the eigenvectors of mean r r^T whose eigenvalues lie below `threshold`. r are the preserved words' last tokens and `augment`
copies of each (directed prior augmentation): a random step along the direction that W hears least, of which those count that the plain
edit would move by more than the mean. `filter` first leaves out the words that it would move by less (influence-based prior filtering).
K is begin-of-text and the means of three clusters of the empty prompt's other tokens (invariant equality constraints).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.common.needs import Need
from concept_ablation.methods.concept_editing import TEMPLATES
from concept_ablation.methods.edited import FIXED, STRENGTH, Edited

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

VALUE = re.compile(r"_v(_|\.|$)")
"""Of the name of a layer that makes values of the text: to_v, add_v_proj."""
CLUSTERS = 3


class Speed(Edited):
    """Its defaults are those of the published code, but for `filter`: see there."""

    name = "speed"
    defaults: ClassVar = {
        **FIXED,
        "templates": ["{}"],
        "projections": "values",
        "threshold": 0.1,
        "retain_scale": 1.0,
        "augment": 10,
        "filter": False,
        "seed": 0,
    }
    schema: ClassVar = {
        **STRENGTH,
        "templates": TEMPLATES,
        "projections": {
            "enum": ["values", "keys", "both"],
            "description": "which projections of the text are edited",
        },
        "threshold": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "directions with less energy than this, in the encodings' units, may change",
        },
        "retain_scale": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "s: how much the weights stay as they are",
        },
        "augment": {
            "type": "integer",
            "minimum": 0,
            "description": "perturbed copies of each preserved word",
        },
        "filter": {
            "type": "boolean",
            "description": "whether words that the plain edit moves less than the mean are left out of what is preserved",
        },
        "seed": {"type": "integer", "minimum": 0, "description": "of the perturbations and the clusters"},
    }

    def groups(self, settings: Mapping) -> set[str]:
        return {"cross-attn"}

    def needs(self, settings: Mapping) -> dict[Need, str]:
        return {"text-projections": f"method {self.name}"}

    def edit(self, spec: Mapping, pipeline: DiffusionPipeline) -> tuple[dict[str, Tensor], list[dict]]:
        import torch

        from concept_ablation.methods.ablation.conditioning import Encoder
        from concept_ablation.methods.concept_editing import encodings, projections

        started, settings = time.perf_counter(), self.settings_of(spec)
        pairs, kept = encodings(spec, pipeline, settings["templates"], "last")
        targets, anchors = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        retained, generator = torch.cat(kept).double(), torch.Generator().manual_seed(settings["seed"])
        (empty,) = Encoder(pipeline).text([""]).hidden.double()
        fixed = torch.cat([empty[:1], centers(empty[1:], CLUSTERS)])
        edited = {}
        for name, weight in projections(pipeline).items():
            if settings["projections"] in ("both", "values" if VALUE.search(name) else "keys"):
                old = weight.double()
                refined = refine(old, targets, anchors, retained, settings["filter"], settings["augment"], generator)  # fmt: skip
                space = null_projector(refined, settings["threshold"])
                change = solve(old, targets, anchors, space, fixed, settings["retain_scale"])
                edited[name] = (old + change).to(weight.dtype)
        return edited, [{"step": 1, "seconds": time.perf_counter() - started}]


def solve(
    weight: Tensor, targets: Tensor, anchors: Tensor, space: Tensor, fixed: Tensor, retain_scale: float
) -> Tensor:
    """The change D of this module's formula, (out, width), float64.

    weight: (out, width). targets, anchors: (n, width), encodings row by row. space: (width, width), the projector P. fixed:
    (m, width), the columns of K as rows; those of them that lie outside the null space are kept by it alone.
    """
    import torch

    moment = targets.T @ targets / len(targets)
    wanted = weight @ (anchors - targets).T @ targets / len(targets)
    system = space @ moment @ space + retain_scale * torch.eye(len(space), dtype=space.dtype, device=space.device)  # fmt: skip
    inner = space @ torch.linalg.solve(system, space)
    inner = (inner + inner.T) / 2
    seen = inner @ fixed.T
    change = wanted @ inner
    return change - change @ fixed.T @ torch.linalg.pinv(fixed @ seen, rtol=1e-9, hermitian=True) @ seen.T


def null_projector(retained: Tensor, threshold: float) -> Tensor:
    """(width, width): the projector on the directions in which the mean of r r^T of `retained`, (n, width), lies below `threshold`."""
    import torch

    values, vectors = torch.linalg.eigh(retained.T @ retained / len(retained))
    free = vectors[:, values < threshold]
    return free @ free.T


def refine(
    weight: Tensor,
    targets: Tensor,
    anchors: Tensor,
    retained: Tensor,
    filters: bool,
    copies: int,
    generator: torch.Generator,
) -> Tensor:
    """(m, width): the preserved encodings that count, with their perturbed copies; see this module.

    retained: (n, width), of the preserved words. filters: whether the less influenced half is left out. copies: of each word.
    """
    import torch

    moment = targets.T @ targets / len(targets)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    plain = weight @ (anchors - targets).T @ targets / len(targets) @ torch.linalg.inv(eye + moment)

    def influenced(encodings: Tensor) -> Tensor:
        moved = (encodings @ plain.T).norm(dim=1)
        return encodings[moved > moved.mean()]

    found = influenced(retained) if filters and copies and len(retained) > 1 else retained
    if not copies:
        return found
    quiet = torch.linalg.svd(weight, full_matrices=True)[2][-1:]
    noise = torch.randn(copies * len(found), found.shape[1], generator=generator, dtype=torch.float64)
    perturbed = found.repeat(copies, 1) + (noise.to(found) @ quiet.T) @ quiet
    return torch.cat([found, influenced(perturbed)])


def centers(points: Tensor, count: int, rounds: int = 100) -> Tensor:
    """(at most `count`, width): the means of k-means' clusters of `points`, (n, width).

    Each cluster starts at the point that lies furthest from those before, the first one at the first point, so nothing is random.
    """
    import torch

    chosen = points[:1]
    for _ in range(min(count, len(points)) - 1):
        chosen = torch.cat([chosen, points[torch.cdist(points, chosen).amin(1).argmax()][None]])
    for _ in range(rounds):
        own = torch.cdist(points, chosen).argmin(1)
        means = [
            points[own == number].mean(0) for number in range(len(chosen)) if bool((own == number).any())
        ]
        moved = torch.stack(means)
        if moved.shape == chosen.shape and torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen


METHOD = Speed()
