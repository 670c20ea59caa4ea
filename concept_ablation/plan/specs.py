"""Turn the table's rows and the config into the specs of a plan.

A spec holds everything that decides its stage's output, and nothing else. Row order, comments, devices and sampling
batch sizes do not affect keys. Nothing here imports torch, transformers or pandas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from concept_ablation.common.remote_code import REFUSED, find_code
from concept_ablation.common.roles import PARAPHRASES
from concept_ablation.plan.attacks import plan_attacks
from concept_ablation.plan.bundle_specs import Member
from concept_ablation.plan.bundles import (
    bundle_names,
    group_members,
    plan_bundles,
    shared_work,
    unknown_names,
)
from concept_ablation.plan.concept import Concept, slug
from concept_ablation.plan.evaluation_specs import (
    Frozen,
    frozen,
    memory_spec,
    plan_judging,
    prompt_path,
    validation_spec,
)
from concept_ablation.plan.families import checked, family_of_model
from concept_ablation.plan.graph import Plan, PlanError, Row
from concept_ablation.plan.interference import plan_interference
from concept_ablation.plan.model_specs import fingerprint_of, model_spec, sha256_of
from concept_ablation.plan.schema import check_config, load_schema
from concept_ablation.plan.settings import SettingsError, shared_settings, with_own
from concept_ablation.plan.stores import share_stores
from concept_ablation.plan.table import load_concepts
from concept_ablation.prompts.templates import SLOT, PromptsError, expand, file_source, read_templates
from concept_ablation.registries import KINDS, METHODS

T = TypeVar("T")
SOURCES = {"language-model": "language_model", "endpoint": "endpoint"}


def load_plan(config: Mapping, schemas: Path, source: str, disabled: bool = False) -> tuple[dict, Plan]:
    """The checked config, see `check_config`, and the plan of the table that it names.

    `schemas`: the folder `workflow/schemas`; `source`: the files that the config came from, for messages; `disabled`:
    whether to plan rows that are switched off, too. Raises ConfigError, ConceptsError, PlanError.
    """
    config_schema = load_schema(schemas / "config.schema.yaml")
    checked = check_config(config, config_schema, source)
    schema = load_schema(schemas / "concepts.schema.yaml")
    rows = load_concepts(checked["concepts"], schema, config_schema, disabled)
    return checked, build_plan(rows, checked)


def build_plan(concepts: Sequence[Concept], config: Mapping) -> Plan:
    """The plan of all rows under a checked config. Relative paths start at the working directory.

    Raises PlanError, which lists every row that can't be planned. A row that is switched off may fail: the plan then only keeps the slugs of its keys.
    """
    plan = Plan(config["results"], config["verdict"], config["report"])
    model = _table_model(config)
    family, settings = family_of_model(model), functools.cache(functools.partial(shared_settings, config))
    errors: list[tuple[int, str]] = []

    def attempt(concept: Concept, step: Callable[[], T]) -> list[T]:
        """What `step` plans of a row; nothing if it can't."""
        try:
            return [step()]
        except (PlanError, PromptsError, SettingsError) as error:
            if concept.enabled:
                errors.append((concept.line, str(error)))
            else:  # its files needn't be here, and nobody asks for its work
                plan.unknown |= _slugs(concept)
            return []

    def member(concept: Concept) -> Member:
        own = checked(family, concept, with_own(settings(concept.kind, concept.preset), concept.overrides))
        if not bundle_names(concept, config):
            return Member(concept, own, "")
        memory = memory_spec(concept, own["evaluation"])
        return Member(concept, own, _plan_prompts(plan, concept, own, model, memory))

    members = [made for concept in concepts for made in attempt(concept, functools.partial(member, concept))]
    bundles = group_members(members, config)
    shared = shared_work(plan, bundles, config)
    judged = []
    for row in members:
        work = (row.concept, row.own, model, config["verdict"], shared.get(row.concept.name))
        judged += attempt(row.concept, functools.partial(_plan_row, plan, *work))
    plan.rows = [row for row, _ in judged]
    errors += plan_bundles(plan, bundles, config, model)
    texts = [f"  config: {text}" for text in unknown_names(concepts, config)]
    texts += [f"  {config['concepts']}:{line}: {text}" for line, text in sorted(errors)]
    if texts:
        raise PlanError("\n".join([f"{config['concepts']}: {len(texts)} row(s) can't be planned", *texts]))
    plan_interference(plan, judged, model)
    return share_stores(plan)


def _table_model(config: Mapping) -> dict:
    """The model's part of all specs. Raises PlanError."""
    fingerprint_of.cache_clear()  # a model may have been replaced since this process's last plan
    try:
        model = model_spec(config["model"], "model.path")
        for folder in (model["path"], model.get("config")):
            if not model.get("trust_remote_code") and folder and (code := find_code(folder)):
                raise PlanError(f"model: {folder}: {REFUSED.format(code=code)}")
    except PlanError as error:
        raise PlanError(f"config: {error}") from None
    return model


def _plan_row(
    plan: Plan,
    concept: Concept,
    own: Mapping,
    model: Mapping,
    limits: Mapping,
    shared: Callable[[], str] | None,
) -> tuple[Row, Mapping]:
    """Add one row's work to the plan, stage by stage, but for its interference; returns it with its settings `evaluation`.

    shared: see `bundles.shared_work`.
    """
    memory = memory_spec(concept, own["evaluation"])
    anchors, ablation = _plan_ablation(plan, concept, own, model, memory, limits, shared)
    row = plan_judging(plan, concept, own, model, anchors, ablation)
    return plan_attacks(plan, row, own, model), own["evaluation"]


def _plan_ablation(
    plan: Plan,
    concept: Concept,
    own: Mapping,
    model: Mapping,
    memory: Mapping,
    limits: Mapping,
    shared: Callable[[], str] | None,
) -> tuple[str | None, str]:
    """Add what makes a row's delta; returns the keys of the anchor's pictures (None if not needed) and of the delta."""
    label = f"{concept.kind}-{'-'.join(concept.targets)}"
    fields = {name: getattr(concept, name) for name in ("kind", "targets", "anchor", "neighbors")}
    row = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    templates = KINDS[concept.kind].templates(own["prompts"]["templates"])
    if concept.delta:
        delta = {"file": concept.delta, "sha256": sha256_of(concept.delta, "delta"), "model": model}
        pair = {name: row[name] for name in ("kind", "targets", "anchor")}
        return None, plan.add("import_delta", label, {**pair, **delta})
    method = METHODS[own["method"]["name"]]
    if wrong := method.mistake(own):
        raise PlanError(wrong)
    if own["training"]["harden"]["every"] and not method.hardens:
        able = ", ".join(name for name in METHODS if METHODS[name].hardens)
        raise PlanError(
            f"training.harden attacks a training of method {able}, and this row's method is {method.name} (allowed with it: "
            "training.harden.every 0, in this row's column, too)"
        )
    work = {name: row[name] for name in method.fields(own)} | {"model": model}
    anchors = None
    if method.uses_anchors:
        anchors = work["anchors"] = _plan_anchors(plan, concept, own, model, memory)
    if method.validates(own):
        work["validation"] = validation_spec(concept, own, limits)
    work |= method.work(own, templates)
    if shared and "preserve_prompts" in work:  # whatever preserves none has none to share
        work["shared"] = shared()
        del work["preserve_prompts"]
    return anchors, plan.add("ablate_concept", label, work)


def _slugs(concept: Concept) -> set[str]:
    """The slugs with which the keys of a row's work begin."""
    subjects = ["-".join(concept.targets), *concept.targets, concept.anchor, *concept.neighbors]
    subjects += map(PARAPHRASES.format, concept.targets)
    return {slug(concept.name), *(slug(f"{concept.kind}-{subject}") for subject in subjects)}


def _plan_anchors(plan: Plan, concept: Concept, own: Mapping, model: Mapping, memory: Mapping) -> str:
    """Add the anchor's prompts and pictures; returns the pictures' key."""
    anchors = dict(own["anchors"])
    negative = ", ".join(concept.targets) if anchors.pop("negative_target") else None
    prompts = _plan_prompts(plan, concept, own, model, memory)
    images = {"prompts": prompts, "model": model, **anchors, **memory, "negative_prompt": negative}
    label = f"{concept.kind}-{concept.target if memory else concept.anchor}"
    return plan.add("generate_anchors", label, images)


def _plan_prompts(plan: Plan, concept: Concept, own: Mapping, model: Mapping, memory: Mapping) -> str:
    """Add the anchor's prompts, written or searched for; returns their key."""
    if not memory:
        label = f"{concept.kind}-{concept.anchor}"
        return plan.add("write_prompts", label, _prompts_spec(concept, own["prompts"]))
    label = f"{concept.kind}-{concept.target}"
    asked = own["prompts"]["source"] != "file" and not concept.prompts
    more = plan.add("write_prompts", label, _prompts_spec(concept, own["prompts"])) if asked else None
    search = {**_search_spec(concept, own["prompts"]), "candidates_from": more, **memory}
    return plan.add("search_prompts", label, {**search, "model": model})


def _prompts_spec(concept: Concept, prompts: Mapping) -> dict:
    """The spec of a row's anchor prompts. A prompt file is read here, so that its mistakes are found now."""
    spec = {"kind": concept.kind, "anchor": concept.anchor, "count": prompts["count"]}
    if prompts["source"] != "file" and not concept.prompts:
        # A model is asked to avoid the targets, so rows can't share its prompts.
        return {**spec, "source": _model_source(prompts), "targets": list(concept.targets)}
    path = concept.prompts or prompt_path(prompts["training"], concept.anchor)
    templates = tuple(read_templates(path))
    slots = _used_slots(templates, prompts["slots"])
    try:
        _check_anchor_prompts(concept.kind, concept.anchor, templates, frozen(slots))
    except PromptsError as error:
        raise PromptsError(f"{path}: {error}") from None
    return {**spec, "source": file_source(path), "slots": slots}


@functools.lru_cache(maxsize=4096)
def _check_anchor_prompts(kind: str, anchor: str, templates: tuple[str, ...], slots: Frozen) -> None:
    """Raises PromptsError if a file gives no prompt of an anchor. Cached, since rows share both."""
    KINDS[kind].anchor_prompts(anchor, templates, dict(slots))


def _model_source(prompts: Mapping) -> dict:
    """The language model's part of a prompt spec. Raises PlanError if the config lacks a setting of it."""
    name = SOURCES[prompts["source"]]
    settings = dict(prompts[name])
    needed = {"language_model": ["path"], "endpoint": ["base_url", "model"]}[name]
    missing = [f"prompts.{name}.{key}" for key in needed if not settings[key]]
    missing += ["prompts.count"] if prompts["count"] is None else []
    if missing:
        raise PlanError(f"prompt source {prompts['source']!r} needs {' and '.join(missing)} in the config")
    if name == "language_model":
        settings |= model_spec(settings, "prompts.language_model.path")
    return {name: settings}


def _search_spec(concept: Concept, prompts: Mapping) -> dict:
    """The spec of the search for prompts that reproduce a memorized picture, and for prompts that don't."""
    path, search = concept.prompts or prompt_path(prompts["training"], concept.anchor), prompts["search"]
    templates, caption = read_templates(path), concept.targets[0]
    slots = {
        **_used_slots(tuple(templates), prompts["slots"]),
        "caption": [caption],
        "anchor": [concept.anchor],
    }
    candidates = [text for text in expand(templates, concept.anchor, slots) if text != caption]
    words = {"kind": concept.kind, "targets": [caption], "anchor": concept.anchor, "file": str(path)}
    wanted = {"anchors_wanted": search["anchors"], "targets_wanted": search["targets"]}
    limits = {
        name: search[name] for name in ("images", "anchor_max", "target_min", "budget", "seed", "sampler")
    }
    return {**words, "candidates": candidates, **wanted, **limits}


def _used_slots(templates: Sequence[str], slots: Mapping[str, Sequence[str]]) -> dict:
    used = set(SLOT.findall("\n".join(templates)))
    return {name: list(values) for name, values in slots.items() if name in used}
