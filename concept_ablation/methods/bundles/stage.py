"""Stage `merge_deltas`: one delta of several, for one model without the concepts of all.

How weights are merged is up to the bundle's way, an entry of `registries.WAYS`. Rows of a token embedding are joined, however the rest
is merged: two deltas can't share one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.diffusion.delta import delta_parameters, save_delta
from concept_ablation.diffusion.stages import load_model
from concept_ablation.methods.ablation.preservation import read_rows
from concept_ablation.methods.bundles.deltas import Deltas
from concept_ablation.methods.records import describe
from concept_ablation.registries import WAYS

log = logging.getLogger(__name__)


def merge_deltas(
    spec: Mapping,
    delta: str | Path,
    *,
    deltas: Sequence[str | Path] = (),
    prompts: Sequence[str | Path] = (),
    device: str = "auto",
) -> None:
    """Write the delta that is merged of `deltas`, files in the order of the spec's `concepts`; none for a way that reads none.

    prompts: files of anchor prompts in the order of the spec's `prompts`, for a way that reads them. Raises MergeError,
    DeltaError, ModelError, PromptsError.
    """
    pipeline, way = load_model(spec["model"], device), WAYS[spec["how"]]
    files = Deltas(pipeline, deltas)
    rows = read_rows(spec["concepts"], spec["prompts"], prompts) if "prompts" in spec else []
    merged, found = way.merge(spec, files, rows, pipeline)
    merged |= files.tokens()
    base = delta_parameters(pipeline, merged) | files.base
    values = {name: base[name].detach() + spec["scale"] * change for name, change in merged.items()}
    save_delta(delta, values, describe_bundle(spec) | found)
    log.info("merged %d deltas (%s): %d tensors, %s", len(deltas), spec["how"], len(values), delta)


def describe_bundle(spec: Mapping) -> dict[str, object]:
    """A bundle's metadata: the base model, what was removed from it, and by which settings."""
    words = ("kind", "targets", "anchor", "delta", "anchors")
    settings = ("how", "scale", "settings", "training", *WAYS[spec["how"]].settings)
    return {
        **describe({name: value for name, value in spec.items() if name != "anchors"}),
        "bundle": spec["bundle"],
        "concepts": [
            {name: concept[name] for name in words if name in concept} for concept in spec["concepts"]
        ],
        "targets": [target for concept in spec["concepts"] for target in concept["targets"]],
        "settings": {name: spec[name] for name in settings if name in spec},
    }
