"""What each stage of each row is told: from the table's rows and the config to the plan's specs.

A spec holds all that decides its stage's output, and nothing else: the table's order, names and comments, devices and
batch sizes enter none. Nothing here imports torch, transformers or pandas.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.concepts import Concept, load_concepts, slug
from concept_ablation.custom_code import REFUSED, find_code
from concept_ablation.hashes import file_hash, fingerprint
from concept_ablation.plan import Plan, PlanError, Row
from concept_ablation.prompts import (
    PARAPHRASES,
    SLOT,
    UNSAFE,
    PromptsError,
    anchor_prompts,
    expand,
    file_source,
    fill,
    probe_prompts,
    read_templates,
    template_set,
)
from concept_ablation.settings import SettingsError, shared_settings, with_own
from concept_ablation.validation import check_config, load_schema

Frozen = tuple[tuple[str, tuple[str, ...]], ...]  # slots and their values, as a cache can keep them
SOURCES = {"language-model": "language_model", "endpoint": "endpoint"}


def load_plan(config: Mapping, schemas: Path, source: str, disabled: bool = False) -> tuple[dict, Plan]:
    """The checked config, its texts made numbers, and the plan of the table that it names.

    `schemas`: the folder `workflow/schemas`; `source`: the files that the config came from, for messages; `disabled`: rows
    that are switched off are planned too. Raises ConfigError, ConceptsError, PlanError.
    """
    config_schema = load_schema(schemas / "config.schema.yaml")
    checked = check_config(config, config_schema, source)
    schema = load_schema(schemas / "concepts.schema.yaml")
    rows = load_concepts(checked["concepts"], schema, config_schema, disabled)
    return checked, build_plan(rows, checked)


def build_plan(concepts: Sequence[Concept], config: Mapping) -> Plan:
    """The plan of all rows under a valid config; relative paths start at the working directory.

    Raises PlanError, which lists every row that can't be planned; of one that is switched off the plan keeps the slugs.
    """
    plan, errors = Plan(config["results"], config["verdict"], config["report"]), []
    _fingerprint.cache_clear()  # a model may have been replaced since this process's last plan
    try:
        model = model_spec(config["model"], "model.path")
        for folder in (model["path"], model.get("config")):
            if not model.get("allow_custom_code") and folder and (code := find_code(folder)):
                raise PlanError(f"model: {folder}: {REFUSED.format(code=code)}")
    except PlanError as error:
        raise PlanError(f"config: {error}") from None
    settings = functools.cache(functools.partial(shared_settings, config))
    for concept in concepts:
        try:
            own = with_own(settings(concept.kind, concept.preset), concept.overrides)
            plan.rows.append(_plan_row(plan, concept, own, model))
        except (PlanError, PromptsError, SettingsError) as error:
            if concept.enabled:
                errors.append(f"  {config['concepts']}:{concept.line}: {error}")
            else:  # hardly anything is here that it needs, and nobody asks for it
                plan.unknown |= _slugs(concept)
    if errors:
        raise PlanError("\n".join([f"{config['concepts']}: {len(errors)} row(s) can't be planned", *errors]))
    plan.rows.sort(key=lambda row: row.concept.name)
    return plan


def model_spec(model: Mapping, key: str) -> dict:
    """A model as specs name it: a folder or file with its fingerprint, or a hub id with its pinned revision.

    Raises PlanError.
    """
    path, revision = model["path"], model.get("revision")
    spec = {"path": path, "revision": revision}
    if model.get("allow_custom_code"):
        spec["allow_custom_code"] = True
    if model.get("config"):
        spec["config"] = model["config"]
        if os.path.exists(model["config"]):
            spec["config_fingerprint"] = _fingerprint(model["config"], key)
    if os.path.exists(path):
        return {**spec, "fingerprint": _fingerprint(path, key)}
    if revision is None:
        raise PlanError(
            f"{key}: {path!r} is no folder here. Give the folder of a model, or a single-file checkpoint; a hub id needs "
            "its pinned revision (for the scorer: an open_clip name and its pretrained weights)"
        )
    return spec


@functools.cache
def _fingerprint(path: str, key: str) -> str:
    """The fingerprint of a model that rows share, looked up once a plan. Raises PlanError."""
    try:
        return fingerprint(path, keep=True)
    except OSError as error:
        raise PlanError(f"{key}: {error.filename}: can't be read: {error.strerror}") from None


def _clip_spec(scorer: Mapping, key: str) -> dict:
    """A CLIP model as specs name it: a folder or a file of weights with its fingerprint, or the name of published weights."""
    model, weights = scorer["model"], scorer["pretrained"]
    if weights is None or os.path.isdir(model):
        return {**scorer, "fingerprint": model_spec({"path": model}, f"{key}.model")["fingerprint"]}
    if os.path.isfile(weights):
        return {**scorer, "fingerprint": _fingerprint(weights, f"{key}.pretrained")}
    return dict(scorer)


def _plan_row(plan: Plan, concept: Concept, own: Mapping, model: Mapping) -> Row:
    """Enter one row's work, stage by stage."""
    label = f"{concept.kind}-{'-'.join(concept.targets)}"
    pair = {"kind": concept.kind, "targets": list(concept.targets), "anchor": concept.anchor}
    templates = template_set(concept.kind, own["prompts"]["templates"])
    memory = _memory_spec(concept, own["evaluation"])
    anchors = None
    if concept.delta:
        delta = {"file": concept.delta, "sha256": _sha256(concept.delta, "delta")}
        ablation = plan.add("import_delta", label, {**pair, **delta, "model": model})
    else:
        anchors = _plan_anchors(plan, concept, own, model, memory)
        training = dict(own["training"], style_templates=templates)
        training["group"], seed = training.pop("parameter_group"), training.pop("seed")
        work = {**pair, "model": model, "anchors": anchors, "training": training, "seed": seed}
        ablation = plan.add("ablate_concept", label, work)
    probes, settings = _probes(concept, own), {"model": model, "sampler": own["evaluation"]["sampler"]}
    samples = plan.add("sample_ablated", label, {**settings, "delta": ablation, "probes": probes})
    base = {}
    for probe in probes:
        plain = {name: value for name, value in probe.items() if name != "role"}
        subject = f"{concept.kind}-{probe['subject']}"
        base[probe["subject"]] = plan.add("sample_base", subject, {**settings, "probe": plain})
    judged = {
        **pair,
        "concept": concept.name,
        "neighbors": list(concept.neighbors),
        "samples": samples,
        "base": base,
    }
    if paraphrases := [probe["subject"] for probe in probes if probe["role"] == "paraphrase"]:
        judged["paraphrases"] = paraphrases
    scores = plan.add("score_concept", concept.name, {**judged, **_judges(concept, own), **memory})
    return Row(concept, anchors, ablation, samples, scores, base)


def _slugs(concept: Concept) -> set[str]:
    """What the keys of a row's work begin with."""
    subjects = ("-".join(concept.targets), *concept.targets, concept.anchor, *concept.neighbors)
    return {slug(concept.name), *(slug(f"{concept.kind}-{subject}") for subject in subjects)}


def _plan_anchors(plan: Plan, concept: Concept, own: Mapping, model: Mapping, memory: Mapping) -> str:
    """Enter the anchor's prompts and pictures; returns the pictures' key."""
    label, anchors = f"{concept.kind}-{concept.anchor}", dict(own["anchors"])
    negative = ", ".join(concept.targets) if anchors.pop("negative_target") else None
    if memory:
        label = f"{concept.kind}-{concept.target}"
        asked = own["prompts"]["source"] != "file" and not concept.prompts
        more = plan.add("write_prompts", label, _prompts_spec(concept, own["prompts"])) if asked else None
        search = {**_search_spec(concept, own["prompts"]), "candidates_from": more, **memory}
        prompts = plan.add("search_prompts", label, {**search, "model": model})
    else:
        prompts = plan.add("write_prompts", label, _prompts_spec(concept, own["prompts"]))
    images = {"prompts": prompts, "model": model, **anchors, **memory, "negative_prompt": negative}
    return plan.add("generate_anchors", label, images)


def _prompts_spec(concept: Concept, prompts: Mapping) -> dict:
    """The spec of a row's anchor prompts. A file is read here, so that its prompts are known to be good."""
    spec = {"kind": concept.kind, "anchor": concept.anchor, "count": prompts["count"]}
    if prompts["source"] != "file" and not concept.prompts:
        # A model is asked to leave the targets out, so its prompts are a row's own.
        return {**spec, "source": _model_source(prompts), "targets": list(concept.targets)}
    path = concept.prompts or _prompt_path(prompts["training"], concept.anchor)
    templates = tuple(read_templates(path))
    slots = _used_slots(templates, prompts["slots"])
    try:
        _check_anchor_prompts(concept.kind, concept.anchor, templates, _frozen(slots))
    except PromptsError as error:
        raise PromptsError(f"{path}: {error}") from None
    return {**spec, "source": file_source(path), "slots": slots}


@functools.lru_cache(maxsize=4096)
def _check_anchor_prompts(kind: str, anchor: str, templates: tuple[str, ...], slots: Frozen) -> None:
    """Raises PromptsError if a file makes no prompt of an anchor; rows share both."""
    anchor_prompts(kind, anchor, templates, dict(slots))


@functools.lru_cache(maxsize=16384)
def _probe_prompts(
    count: int,
    kind: str,
    role: str,
    subject: str,
    anchor: str,
    templates: tuple[str, ...],
    slots: Frozen,
    probe_template: str,
) -> list[str]:
    """A probe's first `count` prompts; rows share most of their neighbors."""
    return probe_prompts(kind, role, subject, anchor, templates, dict(slots), probe_template)[:count]


def _frozen(slots: Mapping[str, Sequence[str]]) -> Frozen:
    return tuple((name, tuple(values)) for name, values in slots.items())


def _model_source(prompts: Mapping) -> dict:
    """The language model that writes prompts, as specs name it. Raises PlanError for what the config doesn't say."""
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
    """The spec of the search for prompts that bring a memorized picture back, and for such as don't."""
    path, search = concept.prompts or _prompt_path(prompts["training"], concept.anchor), prompts["search"]
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


def _memory_spec(concept: Concept, evaluation: Mapping) -> dict:
    """The memorized picture and what tells its copies; empty for the other kinds. Raises PlanError."""
    if concept.kind != "memorization":
        return {}
    descriptor = dict(evaluation["descriptor"])
    if not os.path.exists(descriptor["model"]):
        raise PlanError(
            f"evaluation.descriptor.model: {descriptor['model']!r} is neither a folder nor a file here. Kind memorization tells "
            "copies by it: put it there, or set the path of one that is here"
        )
    if os.path.isfile(descriptor["model"]) and not descriptor["sha256"]:
        found = _sha256(descriptor["model"], "descriptor")
        raise PlanError(
            f"evaluation.descriptor.sha256: {descriptor['model']} can hold code, so its hash is needed. If this is the "
            f"published file, set {found}"
        )
    descriptor["fingerprint"] = _fingerprint(descriptor["model"], "evaluation.descriptor.model")
    image = {"file": concept.image, "sha256": _sha256(str(concept.image), "image")}
    return {"image": image, "descriptor": descriptor}


def _judges(concept: Concept, own: Mapping) -> dict:
    """What a row's scores are made with: the texts, the scorer, the statistics, for unsafe kinds the detector."""
    words, evaluation = own["prompts"], own["evaluation"]
    texts = {
        name: fill(words["target_text"], {"subject": name}) for name in (*concept.targets, *concept.neighbors)
    }
    texts[concept.anchor] = fill(words["anchor_text"], {"subject": concept.anchor})
    judges = {"texts": texts, "statistics": evaluation["statistics"]}
    judges["scorer"] = _clip_spec(evaluation["scorer"], "evaluation.scorer")
    if concept.kind in UNSAFE:
        judges["detector"] = _detector_spec(evaluation["detector"], concept, texts)
    return judges


def _detector_spec(detector: Mapping, concept: Concept, texts: Mapping[str, str]) -> dict:
    if detector["type"] == "nudenet":
        return {name: detector[name] for name in ("type", "labels", "threshold")}
    scorer = detector["scorer"] and _clip_spec(detector["scorer"], "evaluation.detector.scorer")
    unsafe = detector["unsafe"] or [texts[target] for target in concept.targets]
    safe = detector["safe"] or [texts[subject] for subject in (concept.anchor, *concept.neighbors)]
    return {"type": "zero-shot", "scorer": scorer, "unsafe": unsafe, "safe": safe}


def _probes(concept: Concept, own: Mapping) -> list[dict]:
    """The probes of a row: what is drawn by both models, for each target, the anchor and each neighbor.

    With a file of paraphrases, each target is asked for in other words too: a probe of its own, that decides nothing.
    """
    words = own["prompts"]
    file, own_file = words["evaluation"], words["target_evaluation"] or words["evaluation"]
    found = [_probe("target", target, target, own_file, concept, own) for target in concept.targets]
    if words["paraphrases"]:
        for target in concept.targets:
            subject = PARAPHRASES.format(target)
            found.append(_probe("paraphrase", subject, target, words["paraphrases"], concept, own))
    found.append(_probe("anchor", concept.anchor, concept.anchor, file, concept, own))
    found += [_probe("neighbor", neighbor, neighbor, file, concept, own) for neighbor in concept.neighbors]
    return found


def _probe(role: str, subject: str, word: str, file: str, concept: Concept, own: Mapping) -> dict:
    """One probe: `word` in the prompts of `file`, drawn with the seeds of `subject`."""
    words, evaluation = own["prompts"], own["evaluation"]
    path = _prompt_path(file, concept.anchor)
    sources = (concept.anchor, tuple(read_templates(path)), _frozen(words["slots"]), words["probe_template"])
    images = evaluation["images"][role]
    try:
        prompts = _probe_prompts(images, concept.kind, role, word, *sources)
    except PromptsError as error:
        raise PromptsError(f"{path}: {error}") from None
    # A subject's own seeds: with the same ones for all, a bad seed would harm all neighbors at once.
    number = zlib.crc32(subject.encode()) % 1_000_000
    seed = (evaluation["seed"] + 1000 * number) % 2**32
    return {"role": role, "subject": subject, "prompts": prompts, "images": images, "seed": seed}


def _used_slots(templates: Sequence[str], slots: Mapping[str, Sequence[str]]) -> dict:
    used = set(SLOT.findall("\n".join(templates)))
    return {name: list(values) for name, values in slots.items() if name in used}


def _prompt_path(template: str, anchor: str) -> str:
    """A prompt file's path; `{anchor}` in it stands for the anchor's slug."""
    return template.replace("{anchor}", slug(anchor))


def _sha256(path: str, column: str) -> str:
    """SHA-256 of a file that a row names. Raises PlanError."""
    if os.path.exists(path) and not os.path.isfile(path):  # of a device or a pipe the reading never ends
        raise PlanError(f"column {column!r}: {path}: can't be read: it is no file")
    try:
        return file_hash(path, keep=True)
    except OSError as error:
        raise PlanError(f"column {column!r}: {path}: can't be read: {error.strerror}") from None
