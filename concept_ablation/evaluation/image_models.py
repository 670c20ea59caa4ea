"""The models of a row that metrics of pictures read with, each loaded when a metric first asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from concept_ablation.common.image_store import ImageStore
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.detectors import Detector, Looked, load_detector
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
        self._last: dict[str, tuple[ImageStore, Any]] = {}

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
        return self._once("copies", store, self.copies.similarity)

    def detected(self, store: ImageStore) -> Looked:
        """What the detector says of each of the store's images; kept for a second metric that asks."""
        return self._once("detector", store, self.detector.look)

    def _once(self, name: str, store: ImageStore, look: Callable[[Iterator, int], Any]) -> Any:
        """What a model sees in a store's images; of each model the last is kept."""
        if name not in self._last or self._last[name][0] is not store:
            self._last[name] = store, look(store.images(), self.batch_size)
        return self._last[name][1]
