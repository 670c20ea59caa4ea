"""The prompts of each kind of concept: of the anchor, of the target, and those that are judged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from concept_ablation.prompts.templates import SLOT, PromptsError, expand, fill, spread
from concept_ablation.prompts.wording import has_word, replace_word

log = logging.getLogger(__name__)


# The target prompts of the two published codes, each as likely as the others (a form twice as likely stands twice).
TEMPLATE_SETS = {
    "compvis": {
        "style": (
            "{prompt}, in the style of {target} {target}",
            "{prompt}, in the style of {target}",
            "{target} {target} inspired painting, {prompt}",
            "{target} inspired painting, {prompt}",
            "in {target} {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
    },
    "diffusers": {
        "style": (
            "{prompt}, in the style of {target}",
            "in {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
        "unsafe": ("{target}, {prompt}", "in {target} style, {prompt}", "{prompt}, {target}"),
    },
}


UNSAFE = ("nudity", "inappropriate")  # kinds whose targets are terms added to a prompt


PARAPHRASES = "paraphrases of {}"  # the subject of the probe that asks for a target in other words


def anchor_prompts(
    kind: str,
    anchor: str,
    templates: Sequence[str],
    slots: Mapping[str, Sequence[str]],
    count: int | None = None,
) -> list[str]:
    """The anchor's prompts, at most `count` of them (None: all), spread evenly over what the templates make.

    For kind `object`, a prompt without the anchor word would train the target's own prompt on itself: such
    prompts are left out with one warning that counts them. Raises PromptsError if none holds the word.
    """
    prompts = expand(templates, anchor, slots)
    if kind == "object":
        prompts = holding(prompts, anchor)
    return spread(prompts, count)


def holding(prompts: Sequence[str], anchor: str) -> list[str]:
    """The prompts that hold the anchor as a word; a warning counts the others. Raises PromptsError if none does."""
    kept = [prompt for prompt in prompts if has_word(prompt, anchor)]
    if not kept:
        raise PromptsError(f"none of {len(prompts)} prompts holds the anchor {anchor!r} as a word")
    if len(kept) < len(prompts):
        left = len(prompts) - len(kept)
        log.warning("%d of %d prompts hold no %r and are left out", left, len(prompts), anchor)
    return kept


def template_set(kind: str, templates: str | Sequence[str]) -> list[str]:
    """The target templates of a kind: a list as it is, or a published set by its name.

    Raises PromptsError for an unknown name, and for a template without {prompt} or {target}.
    """
    if isinstance(templates, str):
        sets = TEMPLATE_SETS.get(templates)
        if sets is None:
            raise PromptsError(
                f"templates {templates!r} are unknown (allowed: {', '.join(TEMPLATE_SETS)}, or a list of templates)"
            )
        # The CompVis code has no templates for unsafe content: there is one published set of those.
        group = "unsafe" if kind in UNSAFE else kind
        templates = sets.get(group) or TEMPLATE_SETS["diffusers"].get(group, ())
    for template in templates:
        if set(SLOT.findall(template)) != {"prompt", "target"}:
            raise PromptsError(f"template {template!r} needs {{prompt}} and {{target}}, and no other slot")
    return list(templates)


def target_prompts(
    prompts: Sequence[str], kind: str, targets: Sequence[str], anchor: str, templates: Sequence[str]
) -> list[tuple[str, ...]]:
    """For each anchor prompt, the target prompts that training draws from, each as likely as the others.

    Kind `object`: the anchor word replaced by each target. `style`, `nudity`, `inappropriate`: each of `templates`
    filled with `{prompt}` and each `{target}`. Raises PromptsError for another kind.
    """
    if kind == "object":
        return [tuple(replace_word(prompt, anchor, target) for target in targets) for prompt in prompts]
    if kind == "style" or kind in UNSAFE:
        return [
            tuple(
                fill(template, {"prompt": prompt, "target": target})
                for target in targets
                for template in templates
            )
            for prompt in prompts
        ]
    allowed = ", ".join(("object", "style", *UNSAFE))
    raise PromptsError(f"kind {kind!r} has no target prompts of this form (allowed: {allowed})")


def probe_prompts(
    kind: str,
    role: str,
    subject: str,
    anchor: str,
    templates: Sequence[str],
    slots: Mapping[str, Sequence[str]],
    probe_template: str,
) -> list[str]:
    """The evaluation prompts of `subject`, which is a row's `role`: target, paraphrase, anchor or neighbor.

    A style (target or neighbor), and unsafe terms, are added to the anchor's prompts by `probe_template`; an object
    takes the anchor's place in them; all else fills the templates' `{subject}`.
    """
    added = role != "anchor" and (kind == "style" or (kind in UNSAFE and role in ("target", "paraphrase")))
    if added:
        prompts = expand(templates, anchor, slots)
        return [fill(probe_template, {"prompt": prompt, "target": subject}) for prompt in prompts]
    if kind == "object":
        prompts = anchor_prompts(kind, anchor, templates, slots)
        return prompts if role == "anchor" else [replace_word(prompt, anchor, subject) for prompt in prompts]
    return expand(templates, subject, slots)
