"""Delta files as changes of a pipeline's weights, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
)
from concept_ablation.methods.merging import join

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class MergeError(UserError):
    """Deltas that can't be merged; the message names one and says what is allowed."""


class Deltas:
    """The deltas at `paths`. Raises DeltaError if one doesn't fit the pipeline.

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

    def holder(self, name: str) -> str | Path:
        """The first file with a parameter of this name."""
        return next(path for path in self.paths if name in delta_shapes(path))

    def _change(self, path: str | Path, tokens: bool) -> Iterator[tuple[str, Tensor]]:
        for name, value in iterate_delta(path):
            if (parse_token_row(name) is not None) == tokens:
                base = self.base[name]
                yield name, value.to(base) - base
