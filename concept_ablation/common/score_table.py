"""The long table of scores: a line is one metric of one probe on one side.

Sides: `base` and `ablated`, the two models, and `difference`, ablated less base on the same seeds.
"""

import pyarrow as pa

LATER = ("looks", "looks_most")
"""Columns that tables of before they came lack; they are empty there. How often the pictures were looked at, and how often at most."""

COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("concept", "kind", "target", "anchor", "probe", "role")]
    + [("pooled", pa.bool_()), ("side", pa.string()), ("metric", pa.string())]
    + [("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n", pa.int64())]
    + [(name, pa.string()) for name in ("unit", "interval", "text", "against", "features", "samples_key")]
    + [(name, pa.int64()) for name in LATER]
)
"""The long table's columns. Where `pooled` is true, other lines hold the same images: see `roles.is_pooled`."""
