"""Kind `inappropriate`: other unsafe content. A zero-shot detector flags it by default."""

from __future__ import annotations

from concept_ablation.kinds.unsafe import Unsafe


class Inappropriate(Unsafe):
    name = "inappropriate"


KIND = Inappropriate()
