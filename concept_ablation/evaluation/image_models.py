"""The models of a row that metrics of pictures read with, each loaded when a metric first asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from concept_ablation.common.image_store import ImageStore
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.detectors import Detector, load_detector
from concept_ablation.evaluation.memorized import CopyJudge


class ImageModels:
    """What a metric's `read` gets beside the pictures.

    Args:
        spec: the row's, as `scoring.score_concept` takes it.
        scorer: the row's CLIP model.
        device: where further models are loaded.
        batch_size: images at once.
    """

    def __init__(self, spec: Mapping, scorer: ClipScorer, device: str = "cpu", batch_size: int = 64) -> None:
        self.spec, self.scorer, self.device, self.batch_size = spec, scorer, device, batch_size
        self._last: tuple[ImageStore | None, np.ndarray | None] = (None, None)

    @cached_property
    def copies(self) -> CopyJudge:
        """What tells copies of the memorized picture. Raises MemorizationError, FeatureError."""
        return CopyJudge(self.spec["image"], self.spec["descriptor"], self.device)

    @cached_property
    def detector(self) -> Detector:
        """What flags unsafe content. Raises DetectorError, FeatureError."""
        return load_detector(self.spec["detector"], self.scorer, self.device)

    def copy_similarity(self, store: ImageStore) -> np.ndarray:
        """(n,) cosines of the store's images with the memorized picture, -1 to 1; kept for a second metric that asks."""
        if self._last[0] is not store:
            self._last = store, self.copies.similarity(store.images(), self.batch_size)
        return self._last[1]
