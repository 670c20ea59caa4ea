"""General quality: what a bundle's model makes of prompts that no row names, beside the base model, and what chance alone makes.

The pictures of both models have the same prompts and seeds. The base model's pictures of *other* seeds say how large a distance is
that means nothing: the noise floor, by the same estimator from as many pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import pick_device
from concept_ablation.common.image_store import read_store
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.scoring import check_same_seeds
from concept_ablation.evaluation.statistics import (
    Bootstrap,
    Estimate,
    clip_score,
    kid_estimate,
    mean,
    paired_difference,
)

log = logging.getLogger(__name__)
COLUMNS = pa.schema(
    [("metric", pa.string()), ("side", pa.string())]
    + [(name, pa.float64()) for name in ("value", "ci_low", "ci_high")]
    + [("n", pa.int64()), ("interval", pa.string()), ("features", pa.string())]
)


def score_general(
    spec: Mapping,
    samples: str | Path,
    base: str | Path,
    other: str | Path,
    scores: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 64,
) -> None:
    """Write the table of a bundle's general quality: a line a metric and side, columns `COLUMNS`.

    samples: the bundle's pictures; base: the base model's of the same seeds; other: its pictures of other seeds, by which the noise
    floor is measured (side `noise floor`). Raises ScoreError where samples and base don't fit, FeatureError, StoreError.
    """
    scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), pick_device(device))
    stores = [read_store(path) for path in (base, samples, other)]
    check_same_seeds(stores[0], stores[1], "neutral prompts")
    pictures = [scorer.image_features(store.images(), batch_size) for store in stores]
    prompts = stores[0].column("prompt")
    written = list(dict.fromkeys(prompts))
    texts = dict(zip(written, scorer.text_features(written), strict=True))
    statistics = spec["statistics"]
    bootstrap = Bootstrap(statistics["confidence"], statistics["bootstrap"], statistics["seed"])
    found = quality(*pictures, np.stack([texts[prompt] for prompt in prompts]), bootstrap)
    lines = [
        dict(zip(COLUMNS.names, (*place, *estimate, scorer.name), strict=True)) for *place, estimate in found
    ]
    with atomic_output(scores) as part:
        pq.write_table(pa.Table.from_pylist(lines, COLUMNS), part)
    log.info("%s: general quality of %d pictures", spec["bundle"], len(prompts))


def quality(
    base: np.ndarray, bundle: np.ndarray, other: np.ndarray, texts: np.ndarray, bootstrap: Bootstrap
) -> Iterator[tuple[str, str, Estimate]]:
    """Metric, side (as in `scores`; `ablated` is the bundle's model) and estimate. All features are (n, d), rows of length 1; row i of all has the same prompt, whose text is `texts[i]`.

    kid_x1000: 1000 x KID to `base`; of the bundle, and of `other` (noise floor). clip_score_2_5: 2.5 max(cosine with the prompt, 0).
    """
    options = bootstrap.options
    for side, pictures in (("ablated", bundle), ("noise floor", other)):
        found = kid_estimate([(pictures, base)], **options)
        yield "kid_x1000", side, found._replace(value=1000 * found.value, low=1000 * found.low, high=1000 * found.high)  # fmt: skip
    scores = [clip_score((pictures * texts).sum(1)) for pictures in (base, bundle)]
    for side, values in zip(("base", "ablated"), scores, strict=True):
        yield "clip_score_2_5", side, mean(values, **options)
    yield "clip_score_2_5", "difference", paired_difference(scores[1], scores[0], **options)
