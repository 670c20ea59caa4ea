"""Bundles: models without all concepts of several rows, and the work of merging the rows' deltas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from concept_ablation.common.errors import did_you_mean, show
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.evaluation_specs import plan_judging
from concept_ablation.plan.graph import Bundle, Plan, canonical
from concept_ablation.prompts.templates import general_prompts
from concept_ablation.registries import KINDS, METHODS

LINEAR = {"cross-attn", "embedding"}
"""The parameter groups that a closed form merges: keys and values of the text; rows of a token embedding, which are joined."""


@dataclass(frozen=True)
class Member:
    """A row as a bundle needs it: its merged settings, and the key of its anchor's prompts."""

    concept: Concept
    own: Mapping
    prompts: str


def bundle_names(concept: Concept, config: Mapping) -> list[str]:
    """The bundles that a row is in. A row that is switched off is in none."""
    everywhere = config["bundles"]["all"]
    names = [*concept.bundles, *([everywhere] if everywhere else [])]
    return list(dict.fromkeys(names)) if concept.enabled else []


def bundle_settings(config: Mapping, name: str) -> dict:
    """The settings of one bundle: its own laid over those of all."""
    return {**config["bundles"], **config["bundles"]["named"].get(name, {})}


def unknown_names(concepts: Sequence[Concept], config: Mapping) -> list[str]:
    """A message for each bundle that the config has settings for and no row is in."""
    known = {name for concept in concepts for name in bundle_names(concept, config)}
    return [
        f"bundles.named.{name}: no row's column 'bundle' names it{did_you_mean(name, known)}"
        for name in config["bundles"]["named"]
        if name not in known
    ]


def group_members(members: Sequence[Member], config: Mapping) -> dict[str, list[Member]]:
    """The rows of each bundle, by its name."""
    found: dict[str, list[Member]] = {}
    for member in members:
        for name in bundle_names(member.concept, config):
            found.setdefault(name, []).append(member)
    return found


def shared_work(bundles: Mapping[str, Sequence[Member]], config: Mapping) -> dict[str, dict]:
    """By a row's name, what its training preserves together with the bundles' other rows, where the config says so.

    The same for all rows of a bundle, in any order: their words, the keys of their anchors' prompts, their general prompts.
    """
    peers: dict[str, dict[str, tuple[Member, int | None]]] = {}
    for name, rows in bundles.items():
        settings = bundle_settings(config, name)
        if settings["share_preserved"]:
            for row in rows:
                own = peers.setdefault(row.concept.name, {})
                own |= {peer.concept.name: (peer, settings["most_prompts"]) for peer in rows}
    return {name: _shared(list(found.values())) for name, found in peers.items()}


def _shared(peers: Sequence[tuple[Member, int | None]]) -> dict:
    rows = [{**_words(row), **_preserved(row), "most_prompts": most} for row, most in peers]
    return {
        "shared": sorted(rows, key=canonical),
        "shared_prompts": sorted({row.prompts for row, _ in peers}),
        "preserve_prompts": sorted({prompt for row, _ in peers for prompt in _general(row)}),
    }


def plan_bundles(
    plan: Plan, bundles: Mapping[str, Sequence[Member]], config: Mapping, model: Mapping
) -> list[tuple[int, str]]:
    """Add every bundle's work to a plan that has the rows' already; returns line and text of what can't be merged."""
    deltas, errors = {row.concept.name: row.ablation for row in plan.rows}, []
    for name, rows in sorted(bundles.items()):
        settings = bundle_settings(config, name)
        wrong = [(line, f"bundle {show(name)}: {text}") for line, text in _mistakes(rows, settings)]
        errors += wrong
        if not wrong and all(row.concept.name in deltas for row in rows):
            made = {deltas[row.concept.name]: row for row in rows}
            key = plan.add("merge_deltas", name, {"bundle": name, "model": model, **_work(made, settings)})
            judged = [_spared(row, rows) for row in rows] if settings["judge"] else []
            again = [plan_judging(plan, concept, own, model, None, key) for concept, own in judged]
            names = tuple(sorted(row.concept.name for row in rows))
            again.sort(key=lambda row: row.concept.name)
            plan.bundles.append(Bundle(name, settings["how"], key, names, tuple(again)))
    return errors


def _spared(row: Member, rows: Sequence[Member]) -> tuple[Concept, Mapping]:
    """A row as it is judged in its bundle: what another row removes is no neighbor to be kept."""
    gone = {target.casefold() for peer in rows for target in peer.concept.targets}
    kept = tuple(name for name in row.concept.neighbors if name.casefold() not in gone)
    return replace(row.concept, neighbors=kept), row.own


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


def _work(rows: Mapping[str, Member], settings: Mapping) -> dict:
    """What decides a bundle's delta, the same in any order of the rows. `rows`: by the keys of their deltas."""
    own = {"how": settings["how"], "scale": settings["scale"], "deltas": sorted(rows)}
    concepts = [{**_words(rows[key]), "delta": key} for key in own["deltas"]]
    if settings["how"] == "ties":
        own["density"] = settings["density"]
    if settings["how"] == "closed-form":
        own |= {name: settings[name] for name in ("ridge", "preserve_weight")}
        own["prompts"] = sorted({row.prompts for row in rows.values()})
        own["general"] = sorted({prompt for row in rows.values() for prompt in _general(row)})
        more = [_preserved(rows[key]) | {"most_prompts": settings["most_prompts"]} for key in own["deltas"]]
        concepts = [one | words for one, words in zip(concepts, more, strict=True)]
    return own | {"concepts": concepts}


def _words(row: Member) -> dict:
    concept = row.concept
    return {"kind": concept.kind, "targets": list(concept.targets), "anchor": concept.anchor}


def _preserved(row: Member) -> dict:
    """What says, with a row's words, which prompts are its own."""
    templates = KINDS[row.concept.kind].templates(row.own["prompts"]["templates"])
    return {"neighbors": list(row.concept.neighbors), "templates": templates, "prompts": row.prompts}


def _general(row: Member) -> list[str]:
    return general_prompts(row.own["training"]["preserve_prompts"], row.own["prompts"]["slots"])
