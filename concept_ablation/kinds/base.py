"""The base class of kinds. A kind decides a concept's prompts, the measure that judges it, and how the page shows it.

To add a kind, write a file beside this one with an instance called `KIND`, and list it in `registries.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from concept_ablation.prompts.templates import SLOT, PromptsError, expand, fill, subsample_evenly
from concept_ablation.prompts.wording import has_word, replace_word


class Kind:
    """A kind of concept. By default its prompts are filled with the subject's name.

    A subclass sets `name`, `measure` and `limit`, and overrides what differs.
    """

    name: ClassVar[str]
    measure: ClassVar[str]
    """The metric that gives the share of the target's images in which the target is still there."""
    limit: ClassVar[str]
    """The key of the config's `verdict` with the largest share at which a target counts as removed."""
    limit_above_neutral: ClassVar[bool] = False
    """Whether `limit` is added to the share in the base model's anchor images, which no removal can go below."""
    published_templates: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Published templates of target prompts, by the name of the code that has them. All are equally likely."""
    defaults: ClassVar[Mapping[str, Mapping]] = {}
    """This kind's defaults for the config's sections, such as its templates. The config's `kinds` overrides them."""
    one_target: ClassVar[bool] = False
    """Whether a row has one target, so that `;` in it doesn't separate several."""
    needs_image: ClassVar[bool] = False
    """Whether a row names a picture, whose copies the copy descriptor detects."""
    uses_detector: ClassVar[bool] = False
    """Whether the config's detector flags the row's images."""
    searches_prompts: ClassVar[bool] = False
    """Whether target prompts are found by drawing images, instead of made from the anchor prompts."""
    needs_anchor_word: ClassVar[bool] = False
    """Whether an anchor prompt must contain the anchor as a word."""
    veiled: ClassVar[bool] = False
    """Whether the page hides this kind's pictures until a reader asks for them."""
    publishable: ClassVar[bool] = True
    """Whether a model card may show the target's pictures."""
    added_roles: ClassVar[Sequence[str]] = ()
    """The roles whose evaluation prompts are the anchor's with the subject added; others have the subject's own."""

    def anchor_prompts(
        self,
        anchor: str,
        templates: Sequence[str],
        slots: Mapping[str, Sequence[str]],
        count: int | None = None,
    ) -> list[str]:
        """The anchor's prompts: at most `count` (None: all), evenly spaced in the usable ones of the templates.

        Raises PromptsError if no prompt is usable.
        """
        return subsample_evenly(self.usable(expand(templates, anchor, slots), anchor), count)

    def usable(self, prompts: Sequence[str], anchor: str) -> list[str]:
        """The prompts that can be anchor prompts. Raises PromptsError if none can."""
        return list(prompts)

    def target_prompts(
        self, prompts: Sequence[str], targets: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[tuple[str, ...]]:
        """For each anchor prompt, the target prompts that training draws from, all equally likely.

        Raises PromptsError if the kind doesn't make them from the anchor prompts.
        """
        raise PromptsError(f"kind {self.name!r} doesn't make target prompts from anchor prompts")

    def neighbor_prompts(
        self, prompts: Sequence[str], neighbors: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[str]:
        """Prompts that name the neighbors as training names the targets: each alone, and in place of the anchor's word."""
        named = [prompt for prompt in prompts if has_word(prompt, anchor)]
        return [*neighbors, *(replace_word(prompt, anchor, name) for name in neighbors for prompt in named)]

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
        """The first `count` evaluation prompts of `subject` (None: all). `role`: its role in the row, target, paraphrase, anchor or neighbor."""
        return expand(templates, subject, slots)[:count]

    def templates(self, wanted: str | Sequence[str]) -> list[str]:
        """The templates of target prompts. `wanted`: the name of a published set, or a list of templates.

        Raises PromptsError for an unknown name, and for a template without {prompt} or {target}.
        """
        if isinstance(wanted, str):
            if wanted not in PUBLISHED_SETS:
                allowed = ", ".join(PUBLISHED_SETS)
                raise PromptsError(
                    f"templates {wanted!r} are unknown (allowed: {allowed}, or a list of templates)"
                )
            wanted = self.published_templates.get(wanted, ())
        for template in wanted:
            if set(SLOT.findall(template)) != {"prompt", "target"}:
                raise PromptsError(
                    f"template {template!r} needs {{prompt}} and {{target}}, and no other slot"
                )
        return list(wanted)


PUBLISHED_SETS = ("compvis", "diffusers")
"""The names of published templates in a config: the authors' two implementations."""


class AddedKind(Kind):
    """A kind whose target prompts are anchor prompts with the target added."""

    added_roles = ("target", "paraphrase")

    def target_prompts(
        self, prompts: Sequence[str], targets: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[tuple[str, ...]]:
        return [
            tuple(
                fill(template, {"prompt": prompt, "target": target})
                for target in targets
                for template in templates
            )
            for prompt in prompts
        ]

    def neighbor_prompts(
        self, prompts: Sequence[str], neighbors: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[str]:
        if "neighbor" not in self.added_roles:
            return super().neighbor_prompts(prompts, neighbors, anchor, templates)
        return [
            text for texts in self.target_prompts(prompts, neighbors, anchor, templates) for text in texts
        ]

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
        if role not in self.added_roles:
            return expand(templates, subject, slots)[:count]
        prompts = expand(templates, anchor, slots)[:count]
        return [fill(probe_template, {"prompt": prompt, "target": subject}) for prompt in prompts]
