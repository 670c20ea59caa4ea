"""Kind `inappropriate`: other unsafe content by its terms, which a zero-shot detector flags by default."""

from __future__ import annotations

from concept_ablation.kinds.unsafe import Unsafe


class Inappropriate(Unsafe):
    name = "inappropriate"


KIND = Inappropriate()
