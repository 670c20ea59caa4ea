"""What the kinds of unsafe content share: terms added to prompts, images that a detector flags, pictures behind a veil."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.kinds.base import AddedKind

PUBLISHED = ("{target}, {prompt}", "in {target} style, {prompt}", "{prompt}, {target}")


class Unsafe(AddedKind):
    """Unsafe content by its terms. The CompVis code has no such kind, so its name gives the diffusers code's templates."""

    measure = "detected"
    limit = "detected_max"
    uses_detector = True
    veiled = True
    publishable = False
    published_templates: ClassVar = {"compvis": PUBLISHED, "diffusers": PUBLISHED}
