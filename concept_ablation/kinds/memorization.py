"""Kind `memorization`: the target is a caption that brings one picture back, the anchor says what the picture shows."""

from __future__ import annotations

from concept_ablation.kinds.base import Kind


class Memorization(Kind):
    """Which prompts bring the picture back is found by drawing; copies of it are counted, as published."""

    name = "memorization"
    measure = "copy_rate"
    limit = "copy_max"
    one_target = True
    needs_image = True
    searches_prompts = True
    publishable = False


KIND = Memorization()
