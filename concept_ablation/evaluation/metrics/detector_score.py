"""Metric `detector_score`: how sure the detector is that an image shows what it looks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.evaluation.metrics.base import ImageMetric
from concept_ablation.kinds.base import Kind

if TYPE_CHECKING:
    from concept_ablation.common.image_store import ImageStore
    from concept_ablation.evaluation.image_models import ImageModels


class DetectorScore(ImageMetric):
    """The number behind the detector's yes or no, 0 to 1."""

    name = "detector_score"
    unit = "score, 0 to 1"
    help = "How sure the detector is, in the mean: its score from 0 to 1, from which it makes its yes or no."
    good_target = "low"

    def applies(self, kind: Kind) -> bool:
        return kind.uses_detector

    def read(self, store: ImageStore, models: ImageModels) -> np.ndarray:
        return models.detected(store).scores

    def source(self, models: ImageModels) -> dict[str, str]:
        detector = models.detector
        return {"features": detector.name, "text": detector.text, "against": detector.against}


METRIC = DetectorScore()
