"""What a metric is: a number of each image, the interval of their mean, and the words of tables and page about it.

A new metric is a file beside this one, with an instance called `METRIC`, and a line in `registries.METRICS`. The class that
it extends says what it reads:

- `FeatureMetric`: the scorer's features of one probe's images and of the row's texts;
- `ImageMetric`: pictures, those of one model at a time;
- `PairMetric`: pictures, those of both models with the same seed together;
- `RowMetric`: the features of all probes of a row.

The report reads the descriptions, so nothing here imports torch: the models that a metric needs come as `ImageModels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from concept_ablation.evaluation import statistics
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap, Estimate

if TYPE_CHECKING:
    from concept_ablation.common.image_store import ImageStore
    from concept_ablation.evaluation.image_models import ImageModels
    from concept_ablation.kinds.base import Kind

SHARE = "share of images"
"""The unit of metrics that count images."""


@dataclass(frozen=True)
class Values:
    """One metric of one probe, an image a number: (n,) for the base and the ablated model (base None: no such value).

    A metric that makes its own interval may hold here what it makes it from, and in `detail` what else it needs.
    text, against: what was compared, as the table says it; several subjects are separated by `; `.
    """

    base: np.ndarray | None
    ablated: np.ndarray
    text: str = ""
    against: str = ""
    detail: Any = None


class Metric:
    """A metric; a subclass sets `name`, `unit` and `help`, and overrides what differs."""

    name: ClassVar[str]
    unit: ClassVar[str]
    help: ClassVar[str]
    """What the metric says, in a sentence or two, for a reader of the page."""
    interval: ClassVar[Literal["share", "mean", "own"]] = "mean"
    """How the interval is made: of a share of images, of a mean, or by the metric's own `estimates`."""
    roles: ClassVar[tuple[str, ...]] = ("target", "paraphrase", "anchor", "neighbor")
    """The roles of the probes that have this metric."""
    good_target: ClassVar[str] = ""
    """Which values say that the target is gone, for instance "low"; empty: neither."""
    good_kept: ClassVar[str] = ""
    """Which values say that the anchor and the neighbors are as they were, for instance "high"; empty: neither."""
    label: ClassVar[str] = ""
    """Where the metric decides for a kind: that an image shows the target, in a word or three ("seen by CLIP")."""
    shows_target: ClassVar[str] = ""
    """Where the metric decides for a kind: what the images are that show the target, after "images that are"."""
    title: ClassVar[str] = "Target still there"
    """Where the metric decides for a kind: the heading of its card on the page."""
    probe_label: ClassVar[str] = ""
    """The label above a probe's pictures, with {target} for "the target"; empty: `label`."""
    summary: ClassVar[Mapping[str, str]] = {}
    """Role (also `worst_neighbor`) -> the beginning of the summary's columns that hold this metric."""
    summary_form: ClassVar[Literal["change", "models", "interval", "value"]] = "change"
    """What these columns are: base, ablated and change, each with its interval; base and ablated alone; or one value of both
    models, with or without its interval."""
    per_image: ClassVar[bool] = True
    """Whether `values` has a number for each of the probe's images, which the record of images then lists."""
    pooled_against: ClassVar[str] = ""
    """What the lines of several probes pooled name as `against`."""

    @property
    def is_share(self) -> bool:
        """Whether the metric counts images: tables and page then write percentages, and points for changes."""
        return self.unit == SHARE

    def applies(self, kind: Kind) -> bool:
        """Whether rows of this kind have the metric."""
        return True

    def values(self, probe: Probe, row: Row) -> Values | None:
        """The metric of one probe's images; None where it says nothing about them."""
        raise NotImplementedError

    def estimates(self, members: Sequence[Values], bootstrap: Bootstrap) -> dict[str, Estimate]:
        """Model ("base", "ablated", "difference") -> estimate, of one probe or of several that are pooled image by image."""
        ablated = np.concatenate([member.ablated for member in members])
        if self.interval == "share":
            one = partial(statistics.proportion, confidence=bootstrap.level, exact=bootstrap.looks > 1)
            change = partial(statistics.paired_proportion_difference, confidence=bootstrap.level)
        else:
            groups = np.repeat(np.arange(len(members)), [len(member.ablated) for member in members])
            drawn = bootstrap.options | {"groups": groups}
            one, change = partial(statistics.mean, **drawn), partial(statistics.paired_difference, **drawn)
        if members[0].base is None:
            return {"ablated": one(ablated)}
        base = np.concatenate([member.base for member in members])
        return {"base": one(base), "ablated": one(ablated), "difference": change(ablated, base)}

    def source(self, models: ImageModels) -> dict[str, str] | None:
        """What the table's lines say of the model that judges: `features` (its name), `text` and `against`.

        None: it is the scorer, and `text` and `against` are those of `Values`.
        """
        return None

    def decimals(self, value: float) -> int:
        """How many decimals of a value the page shows; shares are written as percentages."""
        return 3


class FeatureMetric(Metric):
    """A metric of the scorer's features of one probe; a subclass has `values`."""


class RowMetric(Metric):
    """A metric of one probe into which other probes enter; a subclass has `values`.

    Its lines stand after those of all probes, and it isn't pooled. Its images have their numbers by another metric.
    """

    per_image = False


class _PictureMetric(Metric):
    """What metrics of pictures share: their numbers are read before the features, and come with the probe."""

    def values(self, probe: Probe, row: Row) -> Values | None:
        return Values(*probe.measured[self.name]) if self.name in probe.measured else None

    def source(self, models: ImageModels) -> dict[str, str] | None:
        return {"features": "", "text": "", "against": ""}


class ImageMetric(_PictureMetric):
    """A metric of pictures; a subclass has `read`."""

    def read(self, store: ImageStore, models: ImageModels) -> np.ndarray:
        """(n,): a number for each image of `store`, in their order."""
        raise NotImplementedError


class PairMetric(_PictureMetric):
    """A metric of two pictures with the same prompt and seed, by the base and by the ablated model; a subclass has `read`."""

    def read(self, base: ImageStore, ablated: ImageStore, models: ImageModels) -> np.ndarray:
        """(n,): a number for each pair of images, in their order."""
        raise NotImplementedError
