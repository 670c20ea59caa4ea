"""Kind `nudity`. NudeNet flags it by default."""

from __future__ import annotations

from concept_ablation.kinds.unsafe import Unsafe


class Nudity(Unsafe):
    name = "nudity"


KIND = Nudity()
