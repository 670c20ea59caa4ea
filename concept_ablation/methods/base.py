"""What a way of removing concepts decides: what names its work, its settings, and how it gets from a spec to a delta.

A new method is a file beside this one (or a folder), with an instance called `METHOD`, and a line in `registries.METHODS`.
Nothing here or at the top of such a file imports torch: the plan reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.common.needs import Need
from concept_ablation.common.settings import changed

if TYPE_CHECKING:
    from torch import Tensor


class Method:
    """A way of removing concepts. A subclass sets `name`, its settings, and `run`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the method gives another delta for the same spec, or a default changes."""
    uses_anchors: ClassVar[bool] = True
    """Whether it reads pictures of the anchor, which are then drawn before it."""
    changes_weights: ClassVar[bool] = True
    """Whether its delta holds weights. Without any a row can't be exported or merged; its metadata say how it is sampled."""
    hardens: ClassVar[bool] = False
    """Whether it can attack its model as it trains (`training.harden`)."""
    row_fields: ClassVar[tuple[str, ...]] = ("kind", "targets", "anchor")
    """The columns of the table that its work depends on; also possible: neighbors."""
    defaults: ClassVar[Mapping[str, object]] = {}
    """Its settings, below `method.<name>` in the config, each with its default."""
    schema: ClassVar[Mapping[str, Mapping]] = {}
    """The JSON schema of each setting."""

    def fields(self, settings: Mapping) -> tuple[str, ...]:
        """The columns of the table that a row's work depends on, given its merged settings."""
        return self.row_fields

    def groups(self, settings: Mapping) -> set[str]:
        """The parameter groups that its delta can be of, given a row's merged settings; none if only the delta tells."""
        return set()

    def validates(self, settings: Mapping) -> bool:
        """Whether it judges its strength on validation pictures: its spec then has `validation`."""
        return False

    def needs(self, settings: Mapping) -> dict[Need, str]:
        """What it asks of the model's family, see `common.needs`: each with the setting or the method that needs it."""
        return {}

    def mistake(self, settings: Mapping) -> str | None:
        """What is wrong with a row's merged settings that no schema can tell, and what is allowed; None: nothing."""
        return None

    def work(self, settings: Mapping, templates: list[str]) -> dict:
        """What its spec holds besides the row's fields, the model and the anchors: all else that decides the delta.

        settings: the row's merged sections, as the config names them. templates: those of the kind's target prompts.
        """
        own = settings["method"].get(self.name, {})
        return {
            "method": self.name,
            "method_version": self.version,
            "templates": templates,
            "settings": changed(own, self.defaults),
        }

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
        """Remove what `spec` says: write the delta and the table of its steps, each whole or not at all.

        anchors: the image store of the anchor's pictures, None unless `uses_anchors`. `self.settings_of(spec)` gives the
        settings. Raises UserError where the spec can't be done.
        """
        raise NotImplementedError

    def templates(self, spec: Mapping) -> list[str]:
        """The templates of target prompts in a spec."""
        return spec["templates"]

    def settings_of(self, spec: Mapping) -> dict:
        """All settings of a spec, those at their defaults too."""
        return {**self.defaults, **spec.get("settings", {})}

    def save(
        self,
        spec: Mapping,
        tensors: Mapping[str, Tensor],
        delta: str | Path,
        training: str | Path,
        records: Sequence[Mapping[str, object]] = (),
        more: Mapping[str, object] | None = None,
    ) -> None:
        """Write a delta and the record of the steps that led to it: `tensors` are new values, named as in `diffusion.delta`.

        more: what the delta's metadata say beside the row and the settings.
        """
        from concept_ablation.diffusion.delta import save_delta
        from concept_ablation.methods.records import describe, write_records

        metadata = {**describe(spec), "settings": self.settings_of(spec), **(more or {})}
        write_records(training, records, metadata)
        save_delta(delta, tensors, metadata)
