"""The table of what brings a row's target back: a line is one family of prompts, or one attack that was learned."""

import pyarrow as pa

SIDES = ("base", "ablated", "control")
"""The roles of the pictures: by the unchanged model, by the row's model, and those of an attack's control."""

COLUMNS = pa.schema(
    [("family", pa.string()), ("n", pa.int64())]
    + [(f"{side}{end}", pa.float64()) for side in SIDES for end in ("", "_low", "_high")]
    + [("worst_low", pa.float64()), ("worst_high", pa.float64())]
    + [(f"{side}_seen", pa.list_(pa.float64())) for side in SIDES]
    + [("budget", pa.string()), ("learned", pa.string())]
)
"""The columns of one row's table. docs/report.md explains them; `_seen`: for each picture whether the target was seen, 0 to 1."""
