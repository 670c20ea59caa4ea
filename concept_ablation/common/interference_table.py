"""The table of what a row's model does to subjects of other rows: a line is one of them."""

import pyarrow as pa

MEASURES = ("recognition", "typical")
"""The metrics by which a victim is compared with the base model's pictures of it."""

DRAWN = "victim {}"
"""Role of the pictures that were drawn for a victim; `{}` is its place in the table."""

_NUMBERS = ("base", "ablated", "change", "low", "high", "p")

COLUMNS = pa.schema(
    [("victim", pa.string()), ("n", pa.int64())]
    + [(f"{metric}_{name}", pa.float64()) for metric in MEASURES for name in _NUMBERS]
    + [("p", pa.float64())]
)
"""The columns of one row's table."""
