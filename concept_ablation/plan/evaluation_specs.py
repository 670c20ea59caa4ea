"""The parts of specs that say how a row is judged: its probes, texts and scorer, and what its kind needs."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Mapping, Sequence

from concept_ablation.common.roles import PARAPHRASES, planned_looks
from concept_ablation.plan.concept import Concept, slug
from concept_ablation.plan.graph import Plan, PlanError, Row
from concept_ablation.plan.model_specs import clip_spec, fingerprint_of, sha256_of
from concept_ablation.prompts.templates import PromptsError, fill, read_templates
from concept_ablation.registries import KINDS, STAGES
from concept_ablation.verdict import LOSSES

Frozen = tuple[tuple[str, tuple[str, ...]], ...]  # slots and their values, hashable for a cache


def plan_judging(
    plan: Plan, concept: Concept, own: Mapping, model: Mapping, anchors: str | None, delta: str
) -> Row:
    """Add the pictures and the scores of a row to the plan: those of the model with `delta`, a key, beside the unchanged one's.

    anchors: the key of its anchor's pictures, if it has any. Raises PlanError, PromptsError.
    """
    pair = {"kind": concept.kind, "targets": list(concept.targets), "anchor": concept.anchor}
    probes, settings = probe_specs(concept, own), {"model": model, "sampler": own["evaluation"]["sampler"]}
    label = f"{concept.kind}-{'-'.join(concept.targets)}"
    base = {}
    for probe in probes:
        plain = {name: value for name, value in probe.items() if name != "role"}
        subject = f"{concept.kind}-{probe['subject']}"
        base[probe["subject"]] = plan.add("sample_base", subject, {**settings, "probe": plain})
    scored = {**scoring_spec(concept, own), **memory_spec(concept, own["evaluation"])}
    asked, stops = {**settings, "delta": delta, "probes": probes}, {}
    if until := until_spec(own, concept.kind, plan.report["verdict"]):
        asked |= {**pair, **scored, **until, "neighbors": list(concept.neighbors), "base": base}
        look = own["evaluation"]["until"]["look"]
        stops["until"] = {"look": look, "looks": planned_looks(probes, look)}
    samples = plan.add("sample_ablated", label, asked)
    judged = {
        **pair,
        "concept": concept.name,
        "neighbors": list(concept.neighbors),
        "samples": samples,
        "base": base,
        "paraphrases": [probe["subject"] for probe in probes if probe["role"] == "paraphrase"],
        **scored,
        **stops,
    }
    return Row(concept, anchors, delta, samples, plan.add("score_concept", concept.name, judged), base)


def until_spec(own: Mapping, kind: str, limits: Mapping[str, float]) -> dict:
    """When a row's pictures are enough; empty where their number is fixed. `limits`: the config's `verdict`, if it decides that."""
    until = own["evaluation"]["until"]
    if until["half_width"] is None and not until["decided"]:
        return {}
    # A metric that is measured in another way may want other pictures; those of a fixed number keep their names.
    until = {**until, "scoring": STAGES["score_concept"].version}
    return {"until": until} | ({"limits": _deciding(kind, limits)} if until["decided"] else {})


def _deciding(kind: str, limits: Mapping[str, float]) -> dict[str, float]:
    """The limits of the verdict that can decide about a row of this kind."""
    names = (KINDS[kind].limit, *(f"{loss}_max" for loss in LOSSES))
    return {name: limits[name] for name in names}


def memory_spec(concept: Concept, evaluation: Mapping) -> dict:
    """The memorized picture and the copy descriptor; empty for kinds without a picture. Raises PlanError."""
    if not KINDS[concept.kind].needs_image:
        return {}
    descriptor = dict(evaluation["descriptor"])
    if not os.path.exists(descriptor["model"]):
        raise PlanError(
            f"evaluation.descriptor.model: there is no folder or file {descriptor['model']!r} here. Copies of memorized "
            "pictures are detected with it: put it there, or set the path of one that is here"
        )
    if os.path.isfile(descriptor["model"]) and not descriptor["sha256"]:
        found = sha256_of(descriptor["model"], "descriptor")
        raise PlanError(
            f"evaluation.descriptor.sha256: {descriptor['model']} can contain code, so its hash is needed. If it is the "
            f"published file, set {found}"
        )
    descriptor["fingerprint"] = fingerprint_of(descriptor["model"], "evaluation.descriptor.model")
    image = {"file": concept.image, "sha256": sha256_of(str(concept.image), "image")}
    return {"image": image, "descriptor": descriptor}


def scoring_spec(concept: Concept, own: Mapping) -> dict:
    """What a row is scored with: texts, scorer, statistics, and the detector for kinds that use it."""
    words, evaluation = own["prompts"], own["evaluation"]
    texts = {
        name: fill(words["target_text"], {"subject": name}) for name in (*concept.targets, *concept.neighbors)
    }
    texts[concept.anchor] = fill(words["anchor_text"], {"subject": concept.anchor})
    scoring = {"texts": texts, "statistics": evaluation["statistics"]}
    scoring["scorer"] = clip_spec(evaluation["scorer"], "evaluation.scorer")
    if KINDS[concept.kind].uses_detector:
        scoring["detector"] = _detector_spec(evaluation["detector"], concept, texts)
    return scoring


def validation_spec(concept: Concept, own: Mapping, limits: Mapping[str, float]) -> dict:
    """What a search for a row's strength draws and how it judges: as the report will, but from other seeds and prompts.

    `limits`: the config's `verdict`. Its limits decide here, so only those that can are part of the key. Raises PlanError.
    """
    search, words = own["training"]["search"], own["prompts"]
    file = _validation_file(concept, words)
    images = {role: count * search["batches"] for role, count in search["images"].items()}
    asked = {
        **own,
        "prompts": {**words, "evaluation": file, "paraphrases": None},
        "evaluation": {**own["evaluation"], "images": images, "seed": search["seed"]},
    }
    judging = scoring_spec(concept, own)
    del judging["statistics"]  # the report's, which decide no look
    return {
        "probes": probe_specs(concept, asked),
        "sampler": search["sampler"] or own["evaluation"]["sampler"],
        "batches": search["batches"],
        "alpha": search["alpha"],
        "limits": _deciding(concept.kind, limits),
        **judging,
        **memory_spec(concept, own["evaluation"]),
    }


def _validation_file(concept: Concept, words: Mapping) -> str:
    """The file of a row's validation prompts. Raises PlanError if the config names one that isn't there."""
    if words["validation"] is None:
        return words["evaluation"]
    path = prompt_path(words["validation"], concept.anchor)
    if not os.path.exists(path):
        raise PlanError(
            f"prompts.validation: there is no file {path} here. By its prompts the training judges its strength: write it, or "
            "set prompts.validation to null; then the prompts of prompts.evaluation are used, with other seeds"
        )
    return path


def _detector_spec(detector: Mapping, concept: Concept, texts: Mapping[str, str]) -> dict:
    if detector["type"] == "nudenet":
        return {name: detector[name] for name in ("type", "labels", "threshold")}
    scorer = detector["scorer"] and clip_spec(detector["scorer"], "evaluation.detector.scorer")
    unsafe = detector["unsafe"] or [texts[target] for target in concept.targets]
    safe = detector["safe"] or [texts[subject] for subject in (concept.anchor, *concept.neighbors)]
    return {"type": "zero-shot", "scorer": scorer, "unsafe": unsafe, "safe": safe}


def probe_specs(concept: Concept, own: Mapping) -> list[dict]:
    """The probes of a row, which both models draw: one for each target, the anchor and each neighbor.

    If there is a file of paraphrases, each target has another probe, which asks for it in other words and decides
    nothing.
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


def asked_prompts(
    role: str, word: str, count: int | None = None, *, concept: Concept, own: Mapping
) -> list[str]:
    """The first `count` evaluation prompts (None: all) of a row that ask for `word` as they do for its target or its anchor.

    Raises PromptsError.
    """
    words = own["prompts"]
    file = words["evaluation"] if role == "anchor" else words["target_evaluation"] or words["evaluation"]
    return _filled(role, word, file, concept, own, count)


def _filled(role: str, word: str, file: str, concept: Concept, own: Mapping, count: int | None) -> list[str]:
    """The first `count` prompts of `file` for `word`; None: all."""
    words, path = own["prompts"], prompt_path(file, concept.anchor)
    sources = (concept.anchor, tuple(read_templates(path)), frozen(words["slots"]), words["probe_template"])
    try:
        return _probe_prompts(count, concept.kind, role, word, *sources)
    except PromptsError as error:
        raise PromptsError(f"{path}: {error}") from None


def _probe(role: str, subject: str, word: str, file: str, concept: Concept, own: Mapping) -> dict:
    """One probe: the prompts of `file` for `word`, drawn with the seeds of `subject`."""
    evaluation = own["evaluation"]
    images = evaluation["images"][role]
    prompts = _filled(role, word, file, concept, own, images)
    # Each subject has its own seeds: if all shared them, a bad seed would count against all neighbors at once.
    seed = first_seed(subject, own)
    return {"role": role, "subject": subject, "prompts": prompts, "images": images, "seed": seed}


def first_seed(name: str, own: Mapping) -> int:
    """The seed of the first picture of a set that is called so; the sets of other names begin elsewhere."""
    return (own["evaluation"]["seed"] + 1000 * (zlib.crc32(name.encode()) % 1_000_000)) % 2**32


@functools.lru_cache(maxsize=16384)
def _probe_prompts(
    count: int | None,
    kind: str,
    role: str,
    subject: str,
    anchor: str,
    templates: tuple[str, ...],
    slots: Frozen,
    probe_template: str,
) -> list[str]:
    """A probe's first `count` prompts. They are cached, since rows share most of their neighbors."""
    return KINDS[kind].probe_prompts(role, subject, anchor, templates, dict(slots), probe_template, count)


def frozen(slots: Mapping[str, Sequence[str]]) -> Frozen:
    return tuple((name, tuple(values)) for name, values in slots.items())


def prompt_path(template: str, anchor: str) -> str:
    """A prompt file's path; `{anchor}` in it stands for the anchor's slug."""
    return template.replace("{anchor}", slug(anchor))
