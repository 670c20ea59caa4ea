"""The base class of the kinds of unsafe content. Their targets are terms that are added to prompts."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.kinds.base import AddedKind

PUBLISHED = ("{target}, {prompt}", "in {target} style, {prompt}", "{prompt}, {target}")


class Unsafe(AddedKind):
    """A detector flags the images, and the page hides them.

    The CompVis code has no such kind, so both names of published templates give the diffusers code's.
    """

    measure = "detected"
    limit = "detected_max"
    uses_detector = True
    veiled = True
    publishable = False
    published_templates: ClassVar = {"compvis": PUBLISHED, "diffusers": PUBLISHED}
