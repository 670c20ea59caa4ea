"""Stage `merge_deltas`: one delta of several, for one model without the concepts of all.

Keys and values of the text are merged in closed form, by what they do to tokens (`merging`). A row's tokens are those of its target
prompts, as training words them, without begin-of-text, which every prompt has. Preserved are all tokens of the empty prompt and of
the rows' anchors, neighbors and general prompts, but for prompts that name a target of any row. `sum` and `ties` take any tensors and
read no prompt. Rows of a token embedding are joined, however the rest is merged: two deltas can't share one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.errors import UserError
from concept_ablation.common.progress import progress_bar
from concept_ablation.diffusion.delta import (
    DeltaError,
    delta_parameters,
    delta_shapes,
    iterate_delta,
    parse_token_row,
    save_delta,
)
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.stages import load_model
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.preservation import prompts_of_all, read_rows, second_moment
from concept_ablation.methods.merging import ClosedForm, add_up, join, ties
from concept_ablation.methods.records import describe

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)
SETTINGS = ("how", "ridge", "preserve_weight", "density", "scale")


class MergeError(UserError):
    """Deltas that can't be merged; the message names one and says what is allowed."""


def merge_deltas(
    spec: Mapping,
    deltas: Sequence[str | Path],
    delta: str | Path,
    *,
    prompts: Sequence[str | Path] = (),
    device: str = "auto",
) -> None:
    """Write the delta that is merged of `deltas`, files in the order of the spec's `concepts`.

    prompts: files of anchor prompts in the order of the spec's `prompts`; none unless `how` is closed-form. Raises MergeError,
    DeltaError, ModelError, PromptsError.
    """
    pipeline = load_model(spec["model"], device)
    files = _Deltas(pipeline, deltas)
    metadata = {
        **describe(spec),
        "bundle": spec["bundle"],
        "concepts": [
            {name: concept[name] for name in ("kind", "targets", "anchor", "delta")}
            for concept in spec["concepts"]
        ],
        "targets": [target for concept in spec["concepts"] for target in concept["targets"]],
        "settings": {name: spec[name] for name in SETTINGS if name in spec},
    }
    if spec["how"] == "closed-form":
        rows = read_rows(spec["concepts"], spec["prompts"], prompts)
        merged, metadata["fit"] = _in_closed_form(spec, rows, pipeline, files)
    elif spec["how"] == "sum":
        merged = add_up(files.changes())
    else:
        merged = ties(files.changes, spec["density"])
    merged |= files.tokens()
    values = {name: files.base[name] + spec["scale"] * change for name, change in merged.items()}
    save_delta(delta, values, metadata)
    log.info("merged %d deltas (%s): %d tensors, %s", len(deltas), spec["how"], len(values), delta)


class _Deltas:
    """Delta files as changes of a pipeline's weights, read tensor by tensor. Raises DeltaError if one doesn't fit.

    base: name in a delta -> the pipeline's value, float32.
    """

    def __init__(self, pipeline: DiffusionPipeline, paths: Sequence[str | Path]) -> None:
        self.paths = list(paths)
        shapes = {path: delta_shapes(path) for path in self.paths}
        own = delta_parameters(pipeline, dict.fromkeys(name for found in shapes.values() for name in found))
        for path, found in shapes.items():
            wrong = [name for name in found if name not in own or tuple(own[name].shape) != found[name]]
            if wrong:
                raise DeltaError(
                    f"{path}: {len(wrong)} of {len(found)} parameters don't fit this model, first {wrong[0]}"
                )
        # MPS has no float64, which merging computes in.
        where = "cpu" if pipeline.device.type == "mps" else pipeline.device
        names = {name: None for found in shapes.values() for name in found}
        self.base = {name: own[name].detach().to(where, torch.float32) for name in names}

    def changes(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Each file's changes of weights, without token rows."""
        label = progress_bar(self.paths, desc="merge_deltas", unit="delta")
        return (self._change(path, tokens=False) for path in label)

    def tokens(self) -> dict[str, Tensor]:
        """The changes of all files' token rows. Raises MergeError if two files have the same row."""
        try:
            return join([self._change(path, tokens=True) for path in self.paths])
        except ValueError as error:
            holding = [str(path) for path in self.paths if str(error) in delta_shapes(path)]
            raise MergeError(
                f"{' and '.join(holding[:2])} both train {error}, and a model has one such row; name the targets in one row of the "
                "table, or leave one of the two out of the bundle"
            ) from None

    def _change(self, path: str | Path, tokens: bool) -> Iterator[tuple[str, Tensor]]:
        for name, value in iterate_delta(path):
            if (parse_token_row(name) is not None) == tokens:
                base = self.base[name]
                yield name, value.to(base) - base


def _in_closed_form(
    spec: Mapping, rows: Sequence[Mapping], pipeline: DiffusionPipeline, files: _Deltas
) -> tuple[dict[str, Tensor], dict]:
    """The merged change of keys and values, and how near it comes. Raises MergeError for other parameters."""
    family, sums = family_of(pipeline), ClosedForm()
    layers = family.text_projections(family.network(pipeline))
    linear = {f"{family.network_name}.{name}.weight" for name in layers}
    other = [name for name in files.base if name not in linear and not parse_token_row(name)]
    if other:
        path = next(path for path in files.paths if other[0] in delta_shapes(path))
        raise MergeError(
            f"{path}: changes {other[0]}, which is no key or value of the text, so `how: closed-form` can't merge it (allowed: sum, "
            "ties)"
        )
    encoder, where = Encoder(pipeline), next(iter(files.base.values())).device
    for row, change in zip(rows, files.changes(), strict=True):
        moment = second_moment(hidden[:, 1:] for hidden in encoder.hidden(row["target_prompts"]))
        sums.add(change, moment.to(where))
    if not sums.outputs:  # token rows alone
        return {}, {}
    kept = ["", *prompts_of_all(rows, spec["general"])]
    preserved = second_moment(encoder.hidden(kept)).to(where)
    merged, fit = sums.solve(preserved, spec["preserve_weight"], spec["ridge"])
    log.info("lost %.3f of what the rows change, moved preserved tokens by %.3f of it", fit.lost, fit.moved)
    return merged, {"lost": fit.lost, "moved": fit.moved}
