"""Kind `memorization`: the target is a caption that reproduces one picture; the anchor says what the picture shows."""

from __future__ import annotations

from concept_ablation.kinds.base import Kind


class Memorization(Kind):
    """As published: target prompts are found by drawing images, and copies of the picture are counted."""

    name = "memorization"
    measure = "copy_rate"
    limit = "copy_max"
    one_target = True
    needs_image = True
    searches_prompts = True
    publishable = False


KIND = Memorization()
