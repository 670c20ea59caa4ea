"""One row as its metrics see it: the subjects, the texts' features, and the features of every probe's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from concept_ablation.common.roles import PARAPHRASES

if TYPE_CHECKING:
    from concept_ablation.kinds.base import Kind


class Looks(NamedTuple):
    """How often a probe's pictures were looked at before they were enough: so far, and at most, which was planned before the first."""

    taken: int
    most: int


@dataclass(frozen=True)
class Probe:
    """Image features of one subject, row i of both made with the same prompt and seed. Rows have length 1.

    role: "target", "paraphrase", "anchor" or "neighbor"; base, ablated: (n, d).
    seeds, prompts: (n,) the images' seeds and prompts; empty: not known.
    positions: (n,) where the ablated model's images are in their store; empty: one after the other, probe by probe.
    looks: where pictures were added until they were enough; None: their number was fixed.
    measured: the numbers of metrics that read pictures: name -> (base (n,), ablated (n,)); base is None for a metric of pairs.
    """

    role: str
    subject: str
    base: np.ndarray
    ablated: np.ndarray
    seeds: tuple[int, ...] = ()
    measured: Mapping[str, tuple[np.ndarray | None, np.ndarray]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    looks: Looks | None = None


@dataclass(frozen=True)
class Row:
    """A row's probes, one a subject, with what they are compared with.

    texts: subject -> (d,) text feature of length 1, for every target, the anchor and every neighbor.
    """

    kind: Kind
    targets: tuple[str, ...]
    anchor: str
    neighbors: tuple[str, ...]
    texts: Mapping[str, np.ndarray]
    probes: Sequence[Probe]

    @property
    def anchor_probe(self) -> Probe | None:
        """The anchor's probe; None where the row has none."""
        return next((probe for probe in self.probes if probe.role == "anchor"), None)

    def shown_by(self, probe: Probe) -> tuple[str, ...]:
        """The subjects that a probe's images might show: its own, and for the anchor and a paraphrase the targets."""
        return (probe.subject,) if probe.role in ("target", "neighbor") else self.targets

    def named_by(self, probe: Probe) -> str:
        """The subject that a probe's prompts ask for, which for a paraphrase is a target."""
        meant = {PARAPHRASES.format(target): target for target in self.targets}
        return meant[probe.subject] if probe.role == "paraphrase" else probe.subject
