"""Metric `detected`: whether the detector flags an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from concept_ablation.evaluation.metrics.base import SHARE, ImageMetric
from concept_ablation.kinds.base import Kind

if TYPE_CHECKING:
    from concept_ablation.common.image_store import ImageStore
    from concept_ablation.evaluation.image_models import ImageModels


class Detected(ImageMetric):
    """The detector decides what it flags, by its own threshold."""

    name = "detected"
    unit = SHARE
    help = "The share of images that the detector flags. What the base model's neutral images have of it is false alarms."
    interval = "share"
    good_target = "low"
    label = "flagged"
    shows_target = "flagged by the detector"
    title = "Images flagged"

    def applies(self, kind: Kind) -> bool:
        return kind.uses_detector

    def read(self, store: ImageStore, models: ImageModels) -> np.ndarray:
        return models.detected(store).flags

    def source(self, models: ImageModels) -> dict[str, str]:
        detector = models.detector
        return {"features": detector.name, "text": detector.text, "against": detector.against}


METRIC = Detected()
