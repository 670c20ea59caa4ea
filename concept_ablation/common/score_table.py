"""The long table of scores: a line is one metric of one probe and one model."""

import pyarrow as pa

COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("concept", "kind", "target", "anchor", "probe", "role")]
    + [("pooled", pa.bool_()), ("model", pa.string()), ("metric", pa.string())]
    + [("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n", pa.int64())]
    + [(name, pa.string()) for name in ("unit", "interval", "text", "against", "features", "key")]
)
"""The long table's columns. Where `pooled` is true, other lines hold the same images: see `roles.is_pooled`."""
