"""What a way to make one model of many rows decides: what it reads, which settings name its result, what it can't do.

A new way is a file beside this one, with an instance called `WAY`, and a line in `registries.WAYS`. Nothing here or at the top of
such a file imports torch: the plan reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from concept_ablation.common.needs import Need

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

    from concept_ablation.methods.bundles.deltas import Deltas


class Way:
    """A way to make one model of many rows. A subclass sets `name`, and `merge` unless another stage than `merge_deltas` makes it."""

    name: ClassVar[str]
    stage: ClassVar[str] = "merge_deltas"
    """The stage that makes the model."""
    reads: ClassVar[tuple[str, ...]] = ("deltas",)
    """What it needs of the rows: `deltas`; `prompts`, of the anchors; `anchors`, their pictures, and so one training's settings."""
    settings: ClassVar[tuple[str, ...]] = ()
    """The settings of `bundles` that decide its result, besides `scale`."""
    defaults: ClassVar[Mapping[str, object]] = {}
    """Settings of its own, below `bundles.<name>` in the config, each with its default."""
    schema: ClassVar[Mapping[str, Mapping]] = {}
    """The JSON schema of each of these."""
    groups: ClassVar[frozenset[str] | None] = None
    """The parameter groups that it takes; None: any."""
    takes: ClassVar[str] = "any weights"
    """The same in words, for a message."""

    def needs(self, settings: Mapping) -> dict[Need, str]:
        """What it asks of the model's family, see `common.needs`, given the bundle's settings."""
        return {}

    def mistakes(self, rows: Sequence[Any], settings: Mapping) -> Iterator[tuple[int, str]]:
        """Line and text of what it can't do, beside other parameter groups.

        rows: `plan.bundles.Member`s, of which `concept` is the row and `own` its merged settings. settings: the bundle's.
        """
        yield from ()

    def work(self, rows: Sequence[Any], settings: Mapping) -> dict:
        """What the spec holds besides the rows, the model and `settings`."""
        return {}

    def settings_of(self, spec: Mapping) -> dict:
        """All settings of its own in a spec, those at their defaults too."""
        return {**self.defaults, **spec.get("settings", {})}

    def merge(
        self, spec: Mapping, deltas: Deltas, rows: Sequence[Mapping], pipeline: DiffusionPipeline
    ) -> tuple[dict[str, Tensor], dict]:
        """The change of the model's weights, by names in a delta, without token rows; and what the delta's metadata say of it.

        rows: the spec's `concepts` with their prompts, see `preservation.read_rows`, if it reads them. Raises UserError.
        """
        raise NotImplementedError
