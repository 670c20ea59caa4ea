"""Metric `copy_similarity`: how much an image resembles the memorized picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.evaluation.metrics.base import ImageMetric
from concept_ablation.evaluation.metrics.copy_rate import AGAINST
from concept_ablation.kinds.base import Kind

if TYPE_CHECKING:
    from concept_ablation.common.image_store import ImageStore
    from concept_ablation.evaluation.image_models import ImageModels


class CopySimilarity(ImageMetric):
    """The cosine of the copy descriptor's vectors, -1 to 1."""

    name = "copy_similarity"
    unit = "cosine"
    help = "The mean cosine of the copy descriptor's vectors of an image and of the memorized picture."
    good_target = "low"

    def applies(self, kind: Kind) -> bool:
        return kind.needs_image

    def read(self, store: ImageStore, models: ImageModels) -> np.ndarray:
        return models.copy_similarity(store)

    def source(self, models: ImageModels) -> dict[str, str]:
        return {"features": models.copies.descriptor.name, "text": "", "against": AGAINST}


METRIC = CopySimilarity()
