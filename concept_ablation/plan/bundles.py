"""Bundles: models without all concepts of several rows, and the work of making and judging them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from concept_ablation.common.errors import did_you_mean, show
from concept_ablation.plan.bundle_specs import (
    Member,
    bundle_settings,
    general_spec,
    probe_of,
    repair_spec,
    shared_spec,
    way_spec,
)
from concept_ablation.plan.bundle_training import training_mistakes
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.evaluation_specs import plan_judging
from concept_ablation.plan.families import bundle_mistakes, family_of_model
from concept_ablation.plan.graph import Bundle, Plan, PlanError
from concept_ablation.prompts.templates import PromptsError
from concept_ablation.registries import METHODS, WAYS


def bundle_names(concept: Concept, config: Mapping) -> list[str]:
    """The bundles that a row is in. A row that is switched off is in none."""
    everywhere = config["bundles"]["all"]
    names = [*concept.bundles, *([everywhere] if everywhere else [])]
    return list(dict.fromkeys(names)) if concept.enabled else []


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


def shared_work(
    plan: Plan, bundles: Mapping[str, Sequence[Member]], config: Mapping
) -> dict[str, Callable[[], str]]:
    """By a row's name, what adds the prompts that its training shares with other rows, where the config says so, and gives their key.

    They are a unit of work of their own, which all rows name by its key: so planning grows with the number of rows, not its square.
    """
    names: dict[str, list[str]] = {}  # a row -> the bundles that it shares with
    for name, rows in sorted(bundles.items()):
        if bundle_settings(config, name)["share_preserved"]:
            for row in rows:
                names.setdefault(row.concept.name, []).append(name)

    @functools.cache
    def add(shares: tuple[str, ...]) -> str:
        return plan.add("share_prompts", "-".join(shares), shared_spec(bundles, shares, config))

    return {row: functools.partial(add, tuple(shares)) for row, shares in names.items()}


def plan_bundles(
    plan: Plan, bundles: Mapping[str, Sequence[Member]], config: Mapping, model: Mapping
) -> list[tuple[int, str]]:
    """Add every bundle's work to a plan that has the rows' already; returns line and text of what can't be made."""
    done, errors = {row.concept.name: row for row in plan.rows}, []
    family = family_of_model(model) if bundles else None
    for name, rows in sorted(bundles.items()):
        settings, rows = bundle_settings(config, name), sorted(rows, key=lambda row: row.concept.name)
        wrong = [(line, f"bundle {show(name)}: {text}") for line, text in _mistakes(rows, settings, family)]
        errors += wrong
        if not wrong and all(row.concept.name in done for row in rows):
            full = [
                replace(row, delta=made.ablation, anchors=made.anchors)
                for row in rows
                for made in [done[row.concept.name]]
            ]
            try:
                plan.bundles.append(_plan_bundle(plan, name, full, settings, config, model))
            except (PlanError, PromptsError) as error:
                errors.append((rows[0].concept.line, f"bundle {show(name)}: {error}"))
    return errors


def _plan_bundle(
    plan: Plan, name: str, rows: Sequence[Member], settings: Mapping, config: Mapping, model: Mapping
) -> Bundle:
    """Add one bundle's work: its model, perhaps repaired; what its rows are judged by; its general quality."""
    way, named = WAYS[settings["how"]], {"bundle": name, "model": model}
    removed_by = {target.casefold(): row.concept.name for row in rows for target in row.concept.targets}
    judged = [_spared(row, removed_by) for row in rows]
    key = plan.add(way.stage, name, named | way_spec(way, rows, settings))
    if settings["repair"]:
        pairs = list(zip(rows, judged, strict=True))
        key = plan.add("repair_bundle", name, named | repair_spec(key, pairs, settings, config["verdict"]))
    names, how = tuple(row.concept.name for row in rows), settings["how"]
    how += ", repaired" if settings["repair"] else ""
    if not settings["judge"]:
        return Bundle(name, how, key, names)
    again = [plan_judging(plan, row.concept, row.own, model, None, key) for row in judged]
    anchors = {row.concept.name: removed_by.get(row.concept.anchor.casefold()) for row in rows}
    gone = {name: by for name, by in anchors.items() if by}
    general = _plan_general(plan, named, rows, key, settings, config)
    return Bundle(name, how, key, names, tuple(again), gone, general)


def _plan_general(
    plan: Plan, named: Mapping, rows: Sequence[Member], key: str, settings: Mapping, config: Mapping
) -> str | None:
    """Add the pictures and scores of a bundle's general quality; returns the scores' key, None if it has no prompts."""
    if settings["general"]["prompts"] is None:
        return None
    drawn = {"model": named["model"], "sampler": config["evaluation"]["sampler"]}
    targets = [target for row in rows for target in row.concept.targets]
    probe, other = (probe_of(settings["general"], config, targets, again) for again in (False, True))
    base, floor = (plan.add("sample_base", "general", {**drawn, "probe": one}) for one in (probe, other))
    probes = [{"role": "general", **probe}]
    samples = plan.add("sample_ablated", "general", {**drawn, "delta": key, "probes": probes})
    stores = {"samples": samples, "base": base, "other": floor}
    return plan.add("score_general", named["bundle"], stores | general_spec(named["bundle"], config))


def _spared(row: Member, gone: Collection[str]) -> Member:
    """A row as it is judged in its bundle: what another row removes is no neighbor to be kept. gone: targets, in lower case."""
    kept = tuple(name for name in row.concept.neighbors if name.casefold() not in gone)
    return replace(row, concept=replace(row.concept, neighbors=kept))


def _mistakes(rows: Sequence[Member], settings: Mapping, family: Any) -> Iterator[tuple[int, str]]:
    """Line and text of what can't be made, as far as it is known before the deltas are there. family: the model's, or None."""
    way, trained = WAYS[settings["how"]], {}
    for text in bundle_mistakes(family, settings):
        yield min(row.concept.line for row in rows), text
    yield from way.mistakes(rows, settings)
    if "anchors" in way.reads:
        yield from training_mistakes(rows, settings, f"how {way.name}")
    if settings["repair"]:
        yield from _repair_mistakes(rows, settings)
    for row in sorted(rows, key=lambda row: row.concept.line) if "deltas" in way.reads else ():
        concept = row.concept
        # What a delta that was made elsewhere changes is seen when it is read.
        method = METHODS[row.own["method"]["name"]]
        groups = set() if concept.delta else method.groups(row.own)
        if not (concept.delta or method.changes_weights):
            yield concept.line, f"method {method.name} changes no weights, so there is nothing to merge (allowed: leave this row out of the bundle; another method)"  # fmt: skip
        if way.groups is not None and (other := sorted(groups - way.groups)):
            taking = [name for name, one in WAYS.items() if "deltas" in one.reads and one.groups is None]
            text = (
                f"how {way.name} merges {way.takes}, and this row's parameter group can be {other[0]} "
                f"(allowed: {', '.join(sorted(way.groups))}; or set the bundle's how to {' or '.join(taking)})"
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


def _repair_mistakes(rows: Sequence[Member], settings: Mapping) -> Iterator[tuple[int, str]]:
    """Line and text of rows that no repair can train: it is one training, of keys and values alone."""
    if "anchors" not in WAYS[settings["how"]].reads:
        yield from training_mistakes(rows, settings, "repair")
    for row in rows:
        group = {**row.own["training"], **settings["training"]}["parameter_group"]
        if group != "cross-attn":
            yield row.concept.line, f"repair trains keys and values of the text, and this row's training.parameter_group is {group} (allowed: cross-attn)"  # fmt: skip


def _trained_words(concept: Concept) -> list[str]:
    """The words whose tokens group `embedding` trains: of each target those that the anchor doesn't share, or all."""
    anchor = set(concept.anchor.casefold().split())
    words = [set(target.casefold().split()) for target in concept.targets]
    return sorted(set().union(*(own - anchor or own for own in words)))
