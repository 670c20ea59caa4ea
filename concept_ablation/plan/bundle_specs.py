"""The specs of a bundle's work: how its model is made and repaired, what its rows share, and its general quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concept_ablation.common.settings import changed
from concept_ablation.plan.bundle_training import training_work
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.evaluation_specs import validation_spec
from concept_ablation.plan.graph import canonical
from concept_ablation.plan.model_specs import clip_spec
from concept_ablation.prompts.templates import PromptsError, general_prompts
from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS

OTHER_SEEDS = 10_000
"""How far the noise floor's seeds lie from those of the pictures that are compared: further than there are pictures."""


@dataclass(frozen=True)
class Member:
    """A row as a bundle needs it: its merged settings, and the keys of its anchor's prompts and pictures and of its delta."""

    concept: Concept
    own: Mapping
    prompts: str
    delta: str | None = None
    anchors: str | None = None


def bundle_settings(config: Mapping, name: str) -> dict:
    """The settings of one bundle: its own laid over those of all, group by group."""
    found = dict(config["bundles"])
    for key, value in config["bundles"]["named"].get(name, {}).items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, Mapping) else value
    return found


def way_spec(way: Any, rows: Sequence[Member], settings: Mapping) -> dict:
    """What decides the model that a `Way` makes, the same in any order of the rows."""
    spec = {"how": way.name, "scale": settings["scale"], **way.work(rows, settings)}
    spec |= training_work(rows, settings) if "anchors" in way.reads else {}
    spec |= {name: settings[name] for name in way.settings}
    if way.defaults:
        spec["settings"] = changed({**way.defaults, **settings.get(way.name, {})}, way.defaults)
    if "prompts" in way.reads:
        spec |= _prompts(rows)
    concepts = []
    for row in rows:
        own = _words(row) | ({"delta": row.delta} if "deltas" in way.reads else {})
        own |= _preserved(row, settings["most_prompts"]) if "prompts" in way.reads else {}
        own |= {"anchors": row.anchors} if "anchors" in way.reads else {}
        concepts.append(own)
    if "deltas" in way.reads:
        spec["deltas"] = sorted({row.delta for row in rows})
        by_delta = {concept["delta"]: concept for concept in concepts}
        return spec | {"concepts": [by_delta[key] for key in spec["deltas"]]}
    if "anchors" in way.reads:
        spec["anchors"] = sorted({row.anchors for row in rows})
    return spec | {"concepts": sorted(concepts, key=canonical)}


def repair_spec(
    key: str, pairs: Sequence[tuple[Member, Member]], settings: Mapping, limits: Mapping[str, float]
) -> dict:
    """What decides a bundle's repair. pairs: each row, and as it is judged; limits: of the verdict. Raises PlanError."""
    rows, gone = [row for row, _ in pairs], {t.casefold() for row, _ in pairs for t in row.concept.targets}
    concepts = []
    for row, judged in pairs:
        # An anchor that another row removes is lost by intent.
        spared = {"anchor_loss_max": 1.0} if row.concept.anchor.casefold() in gone else {}
        own = _words(row) | _preserved(judged, settings["most_prompts"]) | {"concept": row.concept.name}
        own |= {"anchors": row.anchors}
        concepts.append(own | {"validation": validation_spec(judged.concept, row.own, {**limits, **spared})})
    training = {**settings["training"], "steps": settings["repair_steps"]}
    return {
        **training_work(rows, {**settings, "training": training}),
        **_prompts(rows),
        "source": key,
        "anchors": sorted({row.anchors for row in rows}),
        "concepts": sorted(concepts, key=canonical),
    }


def shared_spec(bundles: Mapping[str, Sequence[Member]], names: Sequence[str], config: Mapping) -> dict:
    """What the rows of some bundles preserve together, the same for all of them, in any order."""
    peers = {
        row.concept.name: (row, bundle_settings(config, name)["most_prompts"])
        for name in names
        for row in bundles[name]
    }
    concepts = [_words(row) | _preserved(row, most) for row, most in peers.values()]
    return _prompts([row for row, _ in peers.values()]) | {"concepts": sorted(concepts, key=canonical)}


def general_spec(name: str, config: Mapping) -> dict:
    """What a bundle's general quality is scored with."""
    scorer = clip_spec(config["evaluation"]["scorer"], "evaluation.scorer")
    return {"bundle": name, "scorer": scorer, "statistics": config["evaluation"]["statistics"]}


def probe_of(general: Mapping, config: Mapping, targets: Sequence[str], again: bool) -> dict:
    """The probe of neutral prompts, without those that name one of `targets`; again: with the noise floor's seeds.

    Raises PromptsError.
    """
    asked = general_prompts(general["prompts"], config["prompts"]["slots"])
    prompts = [prompt for prompt in asked if not any(has_word(prompt, target) for target in targets)]
    if not prompts:
        raise PromptsError(
            f"bundles.general.prompts: each of the {len(asked)} prompts of {general['prompts']} names a target of the bundle; "
            "write some that name none, or set it to null"
        )
    seed = (general["seed"] + OTHER_SEEDS * again) % 2**32
    images = general["images"]
    return {"subject": "neutral prompts", "prompts": prompts[:images], "images": images, "seed": seed}


def _prompts(rows: Sequence[Member]) -> dict:
    """The keys of the rows' prompts, and the general prompts of all."""
    return {
        "prompts": sorted({row.prompts for row in rows}),
        "general": sorted({prompt for row in rows for prompt in _general(row)}),
    }


def _words(row: Member) -> dict:
    concept = row.concept
    return {"kind": concept.kind, "targets": list(concept.targets), "anchor": concept.anchor}


def _preserved(row: Member, most: int | None) -> dict:
    """What says, with a row's words, which prompts are its own."""
    templates = KINDS[row.concept.kind].templates(row.own["prompts"]["templates"])
    own = {"neighbors": list(row.concept.neighbors), "templates": templates, "prompts": row.prompts}
    return own | {"most_prompts": most}


def _general(row: Member) -> list[str]:
    return general_prompts(row.own["training"]["preserve_prompts"], row.own["prompts"]["slots"])
