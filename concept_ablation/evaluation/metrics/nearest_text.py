"""What metrics of the nearest text share: whose text, of several subjects', lies nearest to an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concept_ablation.evaluation.metrics.base import Values
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import recognised


def nearest_text(probe: Probe, row: Row, own: Sequence[str], among: Sequence[str]) -> Values:
    """Whether each image's nearest text, of the subjects `among`, is one of `own`: 1 or 0, between them in a tie."""
    texts, indices = np.stack([row.texts[subject] for subject in among]), [among.index(name) for name in own]
    shares = (recognised(side, texts, indices) for side in (probe.base, probe.ablated))
    return Values(*shares, "; ".join(own), "; ".join(subject for subject in among if subject not in own))
