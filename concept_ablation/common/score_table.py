"""The long table of scores: a line is one metric of one probe on one side.

Sides: `base` and `ablated`, the two models, and `difference`, ablated less base on the same seeds.
"""

import pyarrow as pa

COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("concept", "kind", "target", "anchor", "probe", "role")]
    + [("pooled", pa.bool_()), ("side", pa.string()), ("metric", pa.string())]
    + [("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n", pa.int64())]
    + [(name, pa.string()) for name in ("unit", "interval", "text", "against", "features", "samples_key")]
)
"""The long table's columns. Where `pooled` is true, other lines hold the same images: see `roles.is_pooled`."""
