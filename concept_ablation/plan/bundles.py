"""Bundles: models without all concepts of several rows, and the work of merging the rows' deltas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from concept_ablation.common.errors import did_you_mean, show
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import Bundle, Plan, PlanError
from concept_ablation.prompts.templates import general_prompts
from concept_ablation.registries import KINDS, METHODS

LINEAR = {"cross-attn", "embedding"}
"""The parameter groups that a closed form merges: keys and values of the text; rows of a token embedding, which are joined."""


@dataclass(frozen=True)
class Member:
    """A row as a bundle needs it: its merged settings, the key of its delta, and that of its anchor's prompts."""

    concept: Concept
    own: Mapping
    delta: str
    prompts: str


def bundle_names(concept: Concept, config: Mapping) -> list[str]:
    """The bundles that a row is in."""
    everywhere = config["bundles"]["all"]
    return list(dict.fromkeys([*concept.bundles, *([everywhere] if everywhere else [])]))


def unknown_names(concepts: Sequence[Concept], config: Mapping) -> list[str]:
    """A message for each bundle that the config has settings for and no row names."""
    known = {name for concept in concepts for name in bundle_names(concept, config)}
    return [
        f"  config: bundles.named.{name}: no row's column 'bundle' names it{did_you_mean(name, known)}"
        for name in config["bundles"]["named"]
        if name not in known
    ]


def plan_bundles(
    plan: Plan, members: Mapping[str, Sequence[Member]], config: Mapping, model: Mapping
) -> None:
    """Add every bundle's work to the plan. Raises PlanError, which lists all mistakes, one a line."""
    table, named, errors = config["concepts"], config["bundles"]["named"], []
    for name, rows in sorted(members.items()):
        settings = {**config["bundles"], **named.get(name, {})}
        wrong = [f"  {table}:{line}: bundle {show(name)}: {text}" for line, text in _mistakes(rows, settings)]
        errors += wrong
        if not wrong:
            key = plan.add("merge_deltas", name, {"bundle": name, "model": model, **_work(rows, settings)})
            plan.bundles.append(Bundle(name, key, tuple(sorted(row.concept.name for row in rows))))
    if errors:
        raise PlanError("\n".join(errors))


def _mistakes(rows: Sequence[Member], settings: Mapping) -> Iterator[tuple[int, str]]:
    """Line and text of what can't be merged, as far as it is known before the deltas are there."""
    trained: dict[str, int] = {}
    for row in rows:
        concept = row.concept
        # What a delta that was made elsewhere changes is seen when it is read.
        groups = set() if concept.delta else METHODS[row.own["method"]["name"]].groups(row.own)
        if settings["how"] == "closed-form" and (other := sorted(groups - LINEAR)):
            text = (
                f"how closed-form merges keys and values of the text, and this row's training.parameter_group can be {other[0]} "
                "(allowed: cross-attn, embedding; or set the bundle's how to sum or ties)"
            )
            yield concept.line, text
        for word in _trained_words(concept) if "embedding" in groups else ():
            first = trained.setdefault(word, concept.line)
            if first != concept.line:
                text = (
                    f"trains the embedding of {show(word)}, as line {first} does, and a model has one (allowed: different words; or "
                    "both targets in one row)"
                )
                yield concept.line, text


def _trained_words(concept: Concept) -> list[str]:
    """The words whose tokens group `embedding` trains: of each target those that the anchor doesn't share, or all."""
    anchor = set(concept.anchor.casefold().split())
    words = [set(target.casefold().split()) for target in concept.targets]
    return sorted(set().union(*(own - anchor or own for own in words)))


def _work(rows: Sequence[Member], settings: Mapping) -> dict:
    """What decides a bundle's delta, the same in any order of the rows."""
    rows = list({row.delta: row for row in sorted(rows, key=lambda row: row.delta)}.values())
    own = {"how": settings["how"], "scale": settings["scale"], "deltas": [row.delta for row in rows]}
    concepts = [_words(row) for row in rows]
    if settings["how"] == "ties":
        own["density"] = settings["density"]
    if settings["how"] == "closed-form":
        own |= {name: settings[name] for name in ("ridge", "preserve_weight", "most_prompts")}
        general = [prompt for row in rows for prompt in _general(row)]
        own |= {"prompts": sorted({row.prompts for row in rows}), "general": list(dict.fromkeys(general))}
        concepts = [words | preserved_words(row) for words, row in zip(concepts, rows, strict=True)]
    return own | {"concepts": concepts}


def _words(row: Member) -> dict:
    concept = row.concept
    pair = {"kind": concept.kind, "targets": list(concept.targets), "anchor": concept.anchor}
    return {**pair, "delta": row.delta}


def preserved_words(row: Member) -> dict:
    """What says, with kind, targets and anchor, which prompts are a row's own."""
    templates = KINDS[row.concept.kind].templates(row.own["prompts"]["templates"])
    return {"neighbors": list(row.concept.neighbors), "templates": templates, "prompts": row.prompts}


def _general(row: Member) -> list[str]:
    return general_prompts(row.own["training"]["preserve_prompts"], row.own["prompts"]["slots"])
