"""What is planned to bring a row's target back: other wordings, which every row has, and an attack, where the config asks for one."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from concept_ablation.common.errors import show
from concept_ablation.common.roles import MARK
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.evaluation_specs import asked_prompts, first_seed, memory_spec, scoring_spec
from concept_ablation.plan.graph import Plan, PlanError, Row
from concept_ablation.plan.schema import ConfigError, read_config
from concept_ablation.prompts.rewording import Words, reword


def plan_attacks(plan: Plan, row: Row, own: Mapping, model: Mapping) -> Row:
    """A row with the keys of what attacks it. `own`: its settings. Raises PlanError, PromptsError."""
    found = []
    if own["evaluation"]["wordings"]["images"]:
        found.append(_plan_wordings(plan, row, own, model))
    if own["evaluation"]["attack"] != "none":
        found.append(_plan_attack(plan, row, own, model))
    return replace(row, attacks=tuple(found))


def _plan_wordings(plan: Plan, row: Row, own: Mapping, model: Mapping) -> str:
    concept, settings = row.concept, own["evaluation"]["wordings"]
    words = [_words(concept, target, own) for target in concept.targets]
    families = [
        {"family": family, "prompts": prompts, "seed": first_seed(f"{family} of {concept.target}", own)}
        for family, prompts in reword(words, settings["images"]).items()
    ]
    spec = {**judged_work(row, own, model), "families": families}
    return plan.add("probe_wordings", concept.name, spec)


def _plan_attack(plan: Plan, row: Row, own: Mapping, model: Mapping) -> str:
    """The attack that a row's config asks for. Its control aims at the anchor's pictures, with the unchanged model."""
    concept, name, settings = row.concept, own["evaluation"]["attack"], own["evaluation"]["attacks"]
    asked = functools.partial(_first_prompts, concept, own)
    plain, anchor = [asked("target", target) for target in concept.targets], asked("anchor", concept.anchor)
    if name == "prefix":
        aimed = [[f"{MARK} {prompt}" for prompt in prompts] for prompts in plain]
        control = [f"{MARK} {prompt}" for prompt in anchor]
    else:  # what is learned stands in the target's place
        control = asked("target", MARK)
        aimed = [control for _ in plain]
    spec = {
        **judged_work(row, own, model),
        "attack": name,
        "settings": settings[name],
        "aims": {
            "ablated": {"start": concept.target, "prompts": aimed},
            "control": {"start": concept.anchor, "prompts": [control]},
        },
        "plain": plain,
        "images": settings["images"],
        "seed": first_seed(f"{name} of {concept.target}", own),
    }
    return plan.add("attack_concept", concept.name, spec)


def _first_prompts(concept: Concept, own: Mapping, role: str, word: str) -> list[str]:
    """The prompts that a row's pictures of a subject took in turn: prompt i, modulo their number, is picture i's."""
    return asked_prompts(role, word, own["evaluation"]["images"][role], concept=concept, own=own)


def judged_work(row: Row, own: Mapping, model: Mapping) -> dict:
    """What the specs of all attacks have: the model, the delta, the sampler, and what tells whether a target is seen."""
    concept, scoring = row.concept, scoring_spec(row.concept, own)
    named = (*concept.targets, concept.anchor)
    return {
        "model": model,
        "delta": row.ablation,
        "pictures": [row.base[target] for target in concept.targets],
        "control": row.base[concept.anchor],
        "sampler": own["evaluation"]["sampler"],
        "kind": concept.kind,
        "targets": list(concept.targets),
        "anchor": concept.anchor,
        "texts": {subject: scoring["texts"][subject] for subject in named},
        "scorer": scoring["scorer"],
        "confidence": scoring["statistics"]["confidence"],
        **({"detector": scoring["detector"]} if "detector" in scoring else {}),
        **memory_spec(concept, own["evaluation"]),
    }


def _words(concept: Concept, target: str, own: Mapping) -> Words:
    """What the wordings of one target are made of."""
    settings = own["evaluation"]["wordings"]
    others = [name for name in concept.synonyms if name.casefold() != target.casefold()]
    return Words(
        target,
        concept.anchor,
        functools.partial(asked_prompts, "target", concept=concept, own=own),
        asked_prompts("anchor", concept.anchor, settings["images"], concept=concept, own=own),
        concept.neighbors,
        others,
        _translations(settings["languages"], target),
        {family: settings[family] for family in ("paraphrase", "longer", "beside")},
    )


def _translations(path: str | None, target: str) -> list[str]:
    """The target's words in the file of other languages, one each; none without a file or where it hasn't the target."""
    if path is None:
        return []
    try:
        found = os.stat(path)
    except OSError as error:
        raise PlanError(f"evaluation.wordings.languages: {path} can't be read: {error.strerror}") from None
    return list(_read_languages(path, (found.st_mtime_ns, found.st_size)).get(target.casefold(), ()))


@functools.lru_cache(maxsize=64)
def _read_languages(path: str, _version: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Target, in lower case -> its words. Raises PlanError for a file that isn't `target: {language: word}`."""
    try:
        content = read_config(path)
    except ConfigError as error:
        raise PlanError(f"evaluation.wordings.languages: {error}") from None
    for target, words in content.items():
        if not isinstance(words, Mapping) or not all(
            isinstance(word, str) and word.strip() for word in words.values()
        ):
            raise PlanError(
                f"evaluation.wordings.languages: {path}: {show(target)} is {show(words)} (allowed: a group of a language's name and "
                "a word, such as `grumpy cat: {de: mürrische Katze}`)"
            )
    return {
        target.casefold(): tuple(dict.fromkeys(word.strip() for word in words.values()))
        for target, words in content.items()
    }
