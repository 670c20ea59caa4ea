"""Kind `style`: the target is a style that is added to the anchor's prompt ("{prompt} in the style of {target}")."""

from __future__ import annotations

from typing import ClassVar

from concept_ablation.kinds.base import AddedKind


class Style(AddedKind):
    """Some images of neutral prompts count as the style, too, so the limit is added to their share."""

    name = "style"
    measure = "clip_accuracy"
    limit = "style_margin"
    limit_above_neutral = True
    added_roles = ("target", "paraphrase", "neighbor")
    published_templates: ClassVar = {
        "compvis": (
            "{prompt}, in the style of {target} {target}",
            "{prompt}, in the style of {target}",
            "{target} {target} inspired painting, {prompt}",
            "{target} inspired painting, {prompt}",
            "in {target} {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
        # The second form is twice as likely: two of the code's three branches are the same.
        "diffusers": (
            "{prompt}, in the style of {target}",
            "in {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
    }


KIND = Style()
