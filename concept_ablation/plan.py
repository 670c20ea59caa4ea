"""From rows and config to stage specs and keys: what work there is, which of it is equal, which is done.

A *spec* is a dict that holds all that decides a stage's output; a *key* is `<slug>.<12 hex of the spec's
sha256>` and names the output's file. So equal work has one key and is done once, and an edited row gets new
keys while all others keep theirs. Specs name upstream work by its key. Nothing here imports torch or pandas:
this runs whenever Snakemake reads the workflow.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from concept_ablation.concepts import OVERRIDES, Concept, slug
from concept_ablation.prompts import (
    SLOT,
    PromptsError,
    anchor_prompts,
    file_source,
    fill,
    probe_prompts,
    read_templates,
)

# Raise a stage's number when its code gives other output for the same spec; tests/test_stage_lock.py asks for
# it.
VERSIONS = {
    "write_prompts": 1,
    "generate_anchors": 1,
    "ablate_concept": 1,
    "sample_base": 1,
    "sample_ablated": 1,
    "score_concept": 1,
}
# Where each stage writes, below the results folder; the rules say the same.
PATHS = {
    "write_prompts": "prompts/{key}.json",
    "generate_anchors": "anchors/{key}.parquet",
    "ablate_concept": "concepts/{key}/delta.safetensors",
    "sample_base": "base/{key}.parquet",
    "sample_ablated": "samples/{key}.parquet",
    "score_concept": "scores/{key}.parquet",
}
TRAINING_RECORD = "concepts/{key}/training.parquet"
WEIGHT_FILES = {".json", ".txt", ".safetensors", ".bin", ".pt", ".ckpt", ".model"}


class PlanError(ValueError):
    """The rows can't be planned; `str()` lists every problem, one a line."""


def canonical(spec: object) -> str:
    """`spec` as JSON with sorted keys and no spaces: equal specs give equal texts."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def make_key(label: str, spec: Mapping) -> str:
    """The content-addressed key of `spec`; `label` only makes it readable."""
    return f"{slug(label)}.{hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]}"


@functools.lru_cache(maxsize=64)
def fingerprint(folder: str) -> str:
    """12 hex digits that change with a model folder's content; of a large file only three parts are read.

    Hashes the sorted relative names, the sizes and the first, middle and last 64 KiB of the configuration and
    weight files.
    """
    digest, part = hashlib.sha256(), 65536
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in WEIGHT_FILES and p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - part // 2), max(0, size - part)}):
                file.seek(start)
                digest.update(file.read(part))
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """One concept's keys. `base` maps each probe's subject to the key of the base model's pictures."""

    concept: Concept
    anchors: str
    ablation: str
    samples: str
    scores: str
    base: Mapping[str, str]


class Plan:
    """The work of all rows: `rows`, sorted by name, and the specs of every stage by key."""

    def __init__(self, results: str, verdict: Mapping[str, float], page: Mapping[str, int]) -> None:
        self.results = results
        self.report = {"verdict": dict(verdict), "page": dict(page)}
        self.rows: list[Row] = []
        self.specs: dict[str, dict[str, dict]] = {stage: {} for stage in VERSIONS}

    def add(self, stage: str, label: str, spec: Mapping) -> str:
        """Enter one unit of work; returns its key. Equal work is entered once."""
        full = {"stage": stage, "version": VERSIONS[stage], **spec}
        key = make_key(label, full)
        self.specs[stage][key] = full
        return key

    def spec(self, stage: str, key: str) -> str:
        """A unit's spec as one canonical JSON text: the only parameter of its rule."""
        return canonical(self.specs[stage][key])

    def path(self, stage: str, key: str) -> str:
        """The file that a unit of work writes."""
        return f"{self.results}/{PATHS[stage].format(key=key)}"

    def upstream(self, stage: str, key: str, source: str) -> str | list[str]:
        """The file, or files, of stage `source` that a unit of `stage` reads, as its spec names them."""
        names = {
            "write_prompts": "prompts",
            "generate_anchors": "anchors",
            "ablate_concept": "delta",
            "sample_base": "base",
            "sample_ablated": "samples",
        }
        found = self.specs[stage][key][names[source]]
        if isinstance(found, Mapping):
            return [self.path(source, found[subject]) for subject in found]
        return self.path(source, found)

    def files(self, row: Row) -> list[str]:
        """Every file of a row that the report reads."""
        files = [self.path("ablate_concept", row.ablation), self.training_record(row.ablation)]
        files += [self.path("sample_ablated", row.samples), self.path("score_concept", row.scores)]
        return files + [self.path("sample_base", key) for key in dict.fromkeys(row.base.values())]

    def training_record(self, key: str) -> str:
        """The table of training steps that `ablate_concept` writes beside its delta."""
        return f"{self.results}/{TRAINING_RECORD.format(key=key)}"

    @functools.cached_property
    def pending(self) -> list[Row]:
        """The rows of which a file is missing; the others are finished and leave the workflow."""
        return [row for row in self.rows if not all(os.path.exists(file) for file in self.files(row))]

    def pending_files(self) -> list[str]:
        """The files of all unfinished rows: what the report has to wait for."""
        return sorted({file for row in self.pending for file in self.files(row)})

    def report_spec(self) -> str:
        """All rows, sorted by name, with their files and the report's settings, as canonical JSON."""
        return canonical({"rows": [self._report_row(row) for row in self.rows], **self.report})

    def _report_row(self, row: Row) -> dict:
        concept = row.concept
        return {
            "concept": concept.name,
            "kind": concept.kind,
            "target": concept.target,
            "anchor": concept.anchor,
            "neighbors": list(concept.neighbors),
            "scores": self.path("score_concept", row.scores),
            "samples": self.path("sample_ablated", row.samples),
            "base": {subject: self.path("sample_base", key) for subject, key in row.base.items()},
            "delta": self.path("ablate_concept", row.ablation),
            "training": self.training_record(row.ablation),
        }

    def summary(self) -> str:
        """One line: how many rows there are, how many are finished, which are not."""
        names = ", ".join(row.concept.name for row in self.pending[:10])
        more = f" and {len(self.pending) - 10} more" if len(self.pending) > 10 else ""
        done = len(self.rows) - len(self.pending)
        return f"{len(self.rows)} concepts: {done} finished, {len(self.pending)} to do" + (
            f" ({names}{more})" if names else ""
        )


def build_plan(concepts: Sequence[Concept], config: Mapping) -> Plan:
    """The plan of all rows under a valid config; relative paths start at the working directory.

    Raises PlanError.
    """
    plan, errors = Plan(config["results"], config["evaluation"]["verdict"], config["report"]), []
    try:
        model = model_spec(config["model"], "model.path")
        scorer = dict(config["evaluation"]["scorer"])
        if scorer["pretrained"] is None:
            scorer["fingerprint"] = model_spec({"path": scorer["model"]}, "evaluation.scorer.model")[
                "fingerprint"
            ]
    except PlanError as error:
        raise PlanError(f"config: {error}") from None
    for concept in concepts:
        try:
            plan.rows.append(_plan_row(plan, concept, row_config(config, concept), model, scorer))
        except PromptsError as error:
            errors.append(f"  {config['concepts']}:{concept.line}: {error}")
    if errors:
        raise PlanError("\n".join([f"{config['concepts']}: {len(errors)} row(s) can't be planned", *errors]))
    plan.rows.sort(key=lambda row: row.concept.name)
    return plan


def model_spec(model: Mapping, key: str) -> dict:
    """A model as specs name it: a folder with its fingerprint, or a hub id with its pinned revision.

    Raises PlanError.
    """
    path, revision = model["path"], model.get("revision")
    if os.path.isdir(path):
        return {"path": path, "revision": revision, "fingerprint": fingerprint(path)}
    if revision is None:
        raise PlanError(
            f"{key}: {path!r} is no folder here. Give the folder of a model; a hub id needs its "
            "pinned revision (for the scorer: an open_clip name and its pretrained weights)"
        )
    return {"path": path, "revision": revision}


def row_config(config: Mapping, concept: Concept) -> dict:
    """The config with one row's overrides put in."""
    own = copy.deepcopy({name: config[name] for name in ("prompts", "anchors", "training", "evaluation")})
    for column, value in concept.overrides.items():
        *groups, last = OVERRIDES[column]
        functools.reduce(lambda part, name: part[name], groups, own)[last] = value
    return own


def _plan_row(plan: Plan, concept: Concept, own: Mapping, model: Mapping, scorer: Mapping) -> Row:
    """Enter one row's work, stage by stage."""
    kind, target, anchor = concept.kind, concept.target, concept.anchor
    words, evaluation = own["prompts"][kind], own["evaluation"]
    prompts = plan.add("write_prompts", f"{kind}-{anchor}", _prompts_spec(concept, own["prompts"]))
    images = {"prompts": prompts, "model": model, **own["anchors"]}
    anchors = plan.add("generate_anchors", f"{kind}-{anchor}", images)
    training = dict(own["training"], style_templates=words["templates"])
    training["group"], seed = training.pop("parameter_group"), training.pop("seed")
    pair = {"kind": kind, "target": target, "anchor": anchor}
    ablation = plan.add(
        "ablate_concept",
        f"{kind}-{target}",
        {**pair, "model": model, "anchors": anchors, "training": training, "seed": seed},
    )
    probes, settings = _probes(concept, own), {"model": model, "sampler": evaluation["sampler"]}
    samples = plan.add(
        "sample_ablated", f"{kind}-{target}", {**settings, "delta": ablation, "probes": probes}
    )
    base = {}
    for probe in probes:
        plain = {name: value for name, value in probe.items() if name != "role"}
        base[probe["subject"]] = plan.add(
            "sample_base", f"{kind}-{probe['subject']}", {**settings, "probe": plain}
        )
    neighbors = list(concept.neighbors)
    judged = {**pair, "concept": concept.name, "neighbors": neighbors, "samples": samples, "base": base}
    judged |= {"texts": _texts(concept, words), "scorer": scorer, "statistics": evaluation["statistics"]}
    scores = plan.add("score_concept", concept.name, judged)
    return Row(concept, anchors, ablation, samples, scores, base)


def _prompts_spec(concept: Concept, prompts: Mapping) -> dict:
    """The spec of a row's anchor prompts, which can be made: the file is read and holds the anchor."""
    path = concept.prompts or _prompt_path(prompts[concept.kind]["training"], concept.anchor)
    templates = tuple(read_templates(path))
    used = set(SLOT.findall("\n".join(templates)))
    slots = {name: values for name, values in prompts["slots"].items() if name in used}
    try:
        anchor_prompts(concept.kind, concept.anchor, templates, slots, prompts["count"])
    except PromptsError as error:
        raise PromptsError(f"{path}: {error}") from None
    source = file_source(path)
    return {
        "kind": concept.kind,
        "anchor": concept.anchor,
        "source": source,
        "slots": slots,
        "count": prompts["count"],
    }


def _probes(concept: Concept, own: Mapping) -> list[dict]:
    """The probes of a row: what is drawn by both models, for the target, the anchor and each neighbor."""
    words, evaluation = own["prompts"][concept.kind], own["evaluation"]
    path = _prompt_path(words["evaluation"], concept.anchor)
    templates = read_templates(path)
    roles = [
        ("target", concept.target),
        ("anchor", concept.anchor),
        *(("neighbor", n) for n in concept.neighbors),
    ]
    probes = []
    for role, subject in roles:
        arguments = (
            concept.kind,
            subject,
            concept.anchor,
            templates,
            own["prompts"]["slots"],
            words["templates"],
        )
        try:
            made = probe_prompts(*arguments)
        except PromptsError as error:
            raise PromptsError(f"{path}: {error}") from None
        images = evaluation["images"][role]
        probe = {"role": role, "subject": subject, "prompts": made[:images], "images": images}
        probes.append({**probe, "seed": evaluation["seed"]})
    return probes


def _texts(concept: Concept, words: Mapping) -> dict[str, str]:
    """Subject -> the text that the scorer compares its pictures with."""
    texts = {
        name: fill(words["target_text"], {"subject": name}) for name in (concept.target, *concept.neighbors)
    }
    return {**texts, concept.anchor: fill(words["anchor_text"], {"subject": concept.anchor})}


def _prompt_path(template: str, anchor: str) -> str:
    """A prompt file's path; `{anchor}` in it stands for the anchor's slug."""
    return template.replace("{anchor}", slug(anchor))
