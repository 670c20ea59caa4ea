"""Metric `copy_rate`: whether an image is a copy of the memorized picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.evaluation.metrics.base import SHARE, ImageMetric
from concept_ablation.kinds.base import Kind

if TYPE_CHECKING:
    from concept_ablation.common.image_store import ImageStore
    from concept_ablation.evaluation.image_models import ImageModels

AGAINST = "the memorized picture"


class CopyRate(ImageMetric):
    """The copy descriptor decides, by its own threshold."""

    name = "copy_rate"
    unit = SHARE
    help = "The share of images that are copies of the memorized picture, by the copy descriptor."
    interval = "share"
    good_target = "low"
    label = "copied"
    shows_target = "copies of the memorized picture"
    title = "Copies of the memorized picture"

    def applies(self, kind: Kind) -> bool:
        return kind.needs_image

    def read(self, store: ImageStore, models: ImageModels) -> np.ndarray:
        return np.asarray(models.copies.is_copy(models.copy_similarity(store)), dtype=np.float64)

    def source(self, models: ImageModels) -> dict[str, str]:
        return {"features": models.copies.descriptor.name, "text": "", "against": AGAINST}


METRIC = CopyRate()
