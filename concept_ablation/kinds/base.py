"""What a kind of concept decides: its prompts, the measure that judges it, and how the page shows it.

A new kind is a file beside this one, with an instance called `KIND`, and a line in `registries.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from concept_ablation.prompts.templates import SLOT, PromptsError, expand, fill, subsample_evenly


class Kind:
    """A kind of concept; the defaults are those of a plain one, whose prompts are filled with the subject's name.

    A subclass sets `name` and `measure`, and overrides what differs.
    """

    name: ClassVar[str]
    measure: ClassVar[str]
    """The metric whose share of the target's images says that the target is still there."""
    limit: ClassVar[str]
    """The setting of the config's `verdict` that holds the largest share at which a target counts as removed."""
    limit_above_neutral: ClassVar[bool] = False
    """Whether `limit` is added to the share that the base model's anchor images give: no removal can fall below that."""
    published_templates: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Templates of target prompts by the name of the code that published them, each as likely as the others."""
    defaults: ClassVar[Mapping[str, Mapping]] = {}
    """What this kind replaces of the config's sections, below the config's own `kinds`: for instance its templates."""
    one_target: ClassVar[bool] = False
    """Whether a row's target is one text, in which `;` separates nothing."""
    needs_image: ClassVar[bool] = False
    """Whether a row names a picture, whose copies are told by the copy descriptor."""
    uses_detector: ClassVar[bool] = False
    """Whether the config's detector flags the row's images."""
    searches_prompts: ClassVar[bool] = False
    """Whether the target prompts are searched for by drawing, instead of made from the anchor's."""
    needs_anchor_word: ClassVar[bool] = False
    """Whether an anchor prompt has to hold the anchor as a word."""
    veiled: ClassVar[bool] = False
    """Whether the page hides this kind's pictures until a reader asks for them."""
    publishable: ClassVar[bool] = True
    """Whether a model card may show the target's pictures."""

    def anchor_prompts(
        self,
        anchor: str,
        templates: Sequence[str],
        slots: Mapping[str, Sequence[str]],
        count: int | None = None,
    ) -> list[str]:
        """The anchor's prompts, at most `count` of them (None: all), spread evenly over what the templates make.

        Raises PromptsError if none of them can be used.
        """
        return subsample_evenly(self.usable(expand(templates, anchor, slots), anchor), count)

    def usable(self, prompts: Sequence[str], anchor: str) -> list[str]:
        """The prompts that can be anchor prompts. Raises PromptsError if none can."""
        return list(prompts)

    def target_prompts(
        self, prompts: Sequence[str], targets: Sequence[str], anchor: str, templates: Sequence[str]
    ) -> list[tuple[str, ...]]:
        """For each anchor prompt, the target prompts that training draws from, each as likely as the others.

        Raises PromptsError where they can't be made from the anchor prompts.
        """
        raise PromptsError(f"kind {self.name!r} has no target prompts that are made from the anchor's")

    def probe_prompts(
        self,
        role: str,
        subject: str,
        anchor: str,
        templates: Sequence[str],
        slots: Mapping[str, Sequence[str]],
        probe_template: str,
    ) -> list[str]:
        """The evaluation prompts of `subject`, which is a row's `role`: target, paraphrase, anchor or neighbor."""
        return expand(templates, subject, slots)

    def templates(self, wanted: str | Sequence[str]) -> list[str]:
        """The templates of target prompts: a list as it is, or a published set by its name.

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
"""The names by which a config asks for published templates: the authors' two codes."""


class AddedKind(Kind):
    """A kind whose targets are words that are added to the anchor's prompts."""

    added_roles: ClassVar[Sequence[str]] = ("target", "paraphrase")
    """The roles whose evaluation prompts are the anchor's with the subject added."""

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

    def probe_prompts(
        self,
        role: str,
        subject: str,
        anchor: str,
        templates: Sequence[str],
        slots: Mapping[str, Sequence[str]],
        probe_template: str,
    ) -> list[str]:
        if role not in self.added_roles:
            return expand(templates, subject, slots)
        prompts = expand(templates, anchor, slots)
        return [fill(probe_template, {"prompt": prompt, "target": subject}) for prompt in prompts]
