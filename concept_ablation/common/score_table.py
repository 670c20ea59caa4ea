"""The long table of scores: its columns, its metrics and their units."""

import pyarrow as pa

UNITS = {
    "clip_accuracy": "share of images",
    "recognition": "share of images",
    "content": "share of images",
    "copy_rate": "share of images",
    "copy_similarity": "cosine",
    "detected": "share of images",
    "typical": "share of images",
    "clip_cosine": "cosine",
    "clip_score_2_5": "2.5 max(cosine, 0)",
    "image_similarity": "cosine",
    "kid_x1000": "1e-3",
    "neutral_share": "share of images",
    "above_neutral": "share of images",
}
"""Every metric and its unit, in the order of the report."""

SHARES = tuple(name for name, unit in UNITS.items() if unit == "share of images")

COLUMNS = pa.schema(
    [
        (name, pa.string())
        for name in ("concept", "kind", "target", "anchor", "probe", "role", "model", "metric")
    ]
    + [("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n", pa.int64())]
    + [(name, pa.string()) for name in ("unit", "interval", "text", "against", "features", "key")]
)
"""The long table's columns."""
