"""Kind `object`: the target's word replaces the anchor's ("a cat" -> "a grumpy cat")."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from concept_ablation.kinds.base import Kind
from concept_ablation.prompts.templates import PromptsError
from concept_ablation.prompts.wording import has_word, replace_word

log = logging.getLogger(__name__)


class Object(Kind):
    """Whole words and plurals are replaced. A prompt without the anchor's word is useless: it wouldn't change."""

    name = "object"
    measure = "clip_accuracy"
    limit = "target_max"
    needs_anchor_word = True

    def usable(self, prompts: Sequence[str], anchor: str) -> list[str]:
        """The prompts that contain the anchor as a word; a warning counts the rest. Raises PromptsError if none is."""
        kept = [prompt for prompt in prompts if has_word(prompt, anchor)]
        if not kept:
            raise PromptsError(f"none of {len(prompts)} prompts contains the anchor {anchor!r} as a word")
        if len(kept) < len(prompts):
            left = len(prompts) - len(kept)
            log.warning("%d of %d prompts don't contain %r and are left out", left, len(prompts), anchor)
        return kept

    def target_prompts(
        self, prompts: Sequence[str], targets: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[tuple[str, ...]]:
        return [tuple(replace_word(prompt, anchor, target) for target in targets) for prompt in prompts]

    def probe_prompts(
        self,
        role: str,
        subject: str,
        anchor: str,
        templates: Sequence[str],
        slots: Mapping[str, Sequence[str]],
        probe_template: str,
        count: int | None = None,
    ) -> list[str]:
        prompts = self.anchor_prompts(anchor, templates, slots)[:count]
        return prompts if role == "anchor" else [replace_word(prompt, anchor, subject) for prompt in prompts]


KIND = Object()
