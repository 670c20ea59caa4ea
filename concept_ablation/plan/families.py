"""What the table's model can't do: its family is asked before anything runs, by the class that the model's folder names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from concept_ablation.common.needs import ATTACK_NEEDS
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import PlanError
from concept_ablation.prompts.tokenizer import TokenizerError, tokenizer_folder
from concept_ablation.registries import FAMILIES, KINDS, METHODS, WAYS


def pipeline_class(model: Mapping) -> str | None:
    """The class that a model's `model_index.json` names; None if that isn't here or names no family's.

    model: path, revision and, for one file, config. Nothing is downloaded.
    """
    try:
        index = json.loads(Path(tokenizer_folder(model), "model_index.json").read_text(encoding="utf-8"))
    except (TokenizerError, OSError, ValueError, RecursionError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) and name in FAMILIES else None


def family_of_model(model: Mapping) -> Any:
    """The family of a model; None where only its loading will tell."""
    name = pipeline_class(model)
    return None if name is None else FAMILIES[name]


def checked(family: Any, concept: Concept, own: dict) -> dict:
    """A row's merged settings, `own`. Raises PlanError if they ask of the family what it can't do; None knows none."""
    if family is None:
        return own
    found = [] if concept.delta else list(_method_mistakes(family, own))
    found += _sampler_mistakes(family, concept, own)
    attack = own["evaluation"]["attack"]
    if attack in ATTACK_NEEDS:
        found += family.mistakes((), {ATTACK_NEEDS[attack]: f"evaluation.attack {attack}"})
    if found:
        raise PlanError("; ".join(found))
    return own


def _method_mistakes(family: Any, own: Mapping) -> Iterator[str]:
    method = METHODS[own["method"]["name"]]
    yield from family.mistakes(method.groups(own), method.needs(own))


def _sampler_mistakes(family: Any, concept: Concept, own: Mapping) -> Iterator[str]:
    """Schedulers that the family hasn't, each with the setting that names it, where the row draws with it."""
    method, settings = METHODS[own["method"]["name"]], {"evaluation.sampler": own["evaluation"]["sampler"]}
    if not concept.delta and method.uses_anchors:
        settings["anchors.sampler"] = own["anchors"]["sampler"]
    if not concept.delta and method.validates(own):
        settings["training.search.sampler"] = own["training"]["search"]["sampler"] or {}
    if KINDS[concept.kind].searches_prompts:
        settings["prompts.search.sampler"] = own["prompts"]["search"]["sampler"]
    for name, sampler in settings.items():
        scheduler = sampler.get("scheduler", "default")
        if scheduler not in ("default", *family.schedulers):
            allowed = ", ".join(["default", *family.schedulers])
            yield f"{name}.scheduler {scheduler}: {family.title} samples otherwise (allowed: {allowed})"


def bundle_mistakes(family: Any, settings: Mapping) -> Iterator[str]:
    """What a bundle asks of a family that this can't do. settings: the bundle's."""
    if family is None:
        return
    needs = WAYS[settings["how"]].needs(settings)
    preserve = settings["training"].get("preserve", "none")
    if settings["repair"] and preserve in ("null-space", "both"):
        needs = needs | {"text-projections": f"repair with bundles.training.preserve {preserve}"}
    yield from family.mistakes((), needs)
