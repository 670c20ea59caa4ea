"""The registries of kinds, methods, metrics, families and stages. To add an entry, write its file and list it here.

An entry is named `module:attribute` and loaded when it is first asked for. So importing this module is cheap, and
planning loads no torch. Only what is listed here can be imported, never a name from a config or a table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from concept_ablation.common.errors import UserError, did_you_mean, show


class UnknownNameError(UserError):
    """A registry has no entry of this name; the message lists the names that it has."""


class Registry(Mapping[str, Any]):
    """Name -> entry, in the order of `targets`. `noun`: what an entry is called in messages."""

    def __init__(self, noun: str, targets: Mapping[str, str]) -> None:
        self.noun, self.targets = noun, dict(targets)
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The entry called `name`. Raises UnknownNameError."""
        if name not in self.targets:
            allowed = ", ".join(self.targets)
            raise UnknownNameError(
                f"{self.noun} {show(name)} is unknown{did_you_mean(name, self.targets)} (allowed: {allowed})"
            )
        if name not in self._loaded:
            self._loaded[name] = load(self.targets[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __contains__(self, name: object) -> bool:
        return name in self.targets


def load(target: str) -> Any:
    """Import what `module:attribute` names. Only for targets that this package lists, never for a user's text."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline; the workflow has a rule of the same name. The key of a unit of work comes from its spec.

    version: raise it when the stage's code gives other output for the same spec; tests/test_stage_lock.py asks for it.
    files: the files of a unit below the results folder, by the names that the rule and the function use. The first one
    stands for the unit and is written last.
    function: `module:function`. It is called with the spec, the rule's inputs and outputs by name, and `options`.
    options: parameters of the function that the rule's resources of the same names give. They change no result.
    neutral: dotted paths of settings that specs got later, each with the value that leaves the output as it was. A
    setting with this value is left out of the spec, so a new setting changes no existing key.
    """

    version: int
    files: Mapping[str, str]
    function: str
    options: tuple[str, ...] = ()
    neutral: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The file that stands for a unit of work, below the results folder, with `{key}` in it."""
        return next(iter(self.files.values()))

    @property
    def run(self) -> Callable[..., None]:
        """The stage's function, loaded when it is asked for."""
        return load(self.function)


KINDS = Registry(
    "kind",
    {
        "style": "concept_ablation.kinds.style:KIND",
        "object": "concept_ablation.kinds.object:KIND",
        "memorization": "concept_ablation.kinds.memorization:KIND",
        "nudity": "concept_ablation.kinds.nudity:KIND",
        "inappropriate": "concept_ablation.kinds.inappropriate:KIND",
    },
)
"""The kinds of concept: how one is prompted, judged and shown. An entry is a `concept_ablation.kinds.base.Kind`."""

METHODS = Registry(
    "method",
    {
        "ablation": "concept_ablation.methods.ablation.method:METHOD",
        "esd": "concept_ablation.methods.esd:METHOD",
        "uce": "concept_ablation.methods.uce:METHOD",
        "rece": "concept_ablation.methods.rece:METHOD",
        "speed": "concept_ablation.methods.speed:METHOD",
        "negative-prompt": "concept_ablation.methods.negative_prompt:METHOD",
        "none": "concept_ablation.methods.none:METHOD",
    },
)
"""The ways to remove a concept. An entry is a `concept_ablation.methods.base.Method`."""

DEFAULT_METHOD = "ablation"
"""The method of specs that name none, since they are older than the choice."""


def method_of(spec: Mapping) -> Any:
    """The method that a spec of `ablate_concept` names. Raises UnknownNameError."""
    return METHODS[spec.get("method", DEFAULT_METHOD)]


WAYS = Registry(
    "way to bundle",
    {
        "closed-form": "concept_ablation.methods.bundles.closed_form:WAY",
        "sum": "concept_ablation.methods.bundles.sums:WAY",
        "ties": "concept_ablation.methods.bundles.ties:WAY",
        "joint": "concept_ablation.methods.bundles.joint:WAY",
        "sequential": "concept_ablation.methods.bundles.sequential:WAY",
        "uce": "concept_ablation.methods.bundles.uce:WAY",
    },
)
"""The ways to make one model of many rows. An entry is a `concept_ablation.methods.bundles.base.Way`."""

METRICS = Registry(
    "metric",
    {
        "clip_accuracy": "concept_ablation.evaluation.metrics.clip_accuracy:METRIC",
        "recognition": "concept_ablation.evaluation.metrics.recognition:METRIC",
        "content": "concept_ablation.evaluation.metrics.content:METRIC",
        "copy_rate": "concept_ablation.evaluation.metrics.copy_rate:METRIC",
        "copy_similarity": "concept_ablation.evaluation.metrics.copy_similarity:METRIC",
        "detected": "concept_ablation.evaluation.metrics.detected:METRIC",
        "detector_score": "concept_ablation.evaluation.metrics.detector_score:METRIC",
        "typical": "concept_ablation.evaluation.metrics.typical:METRIC",
        "clip_cosine": "concept_ablation.evaluation.metrics.clip_cosine:METRIC",
        "clip_score_2_5": "concept_ablation.evaluation.metrics.clip_score_2_5:METRIC",
        "image_similarity": "concept_ablation.evaluation.metrics.image_similarity:METRIC",
        "kid_x1000": "concept_ablation.evaluation.metrics.kid_x1000:METRIC",
        "neutral_share": "concept_ablation.evaluation.metrics.neutral_share:METRIC",
        "above_neutral": "concept_ablation.evaluation.metrics.above_neutral:METRIC",
    },
)
"""What is measured, in the order of the tables. An entry is a `concept_ablation.evaluation.metrics.base.Metric`."""

FAMILIES = Registry(
    "family",
    {
        "StableDiffusionPipeline": "concept_ablation.diffusion.families.stable_diffusion:FAMILY",
        "StableDiffusionXLPipeline": "concept_ablation.diffusion.families.stable_diffusion_xl:FAMILY",
        "StableDiffusion3Pipeline": "concept_ablation.diffusion.families.stable_diffusion_3:FAMILY",
        "FluxPipeline": "concept_ablation.diffusion.families.flux:FAMILY",
    },
)
"""Model architectures, by pipeline class. An entry is a `concept_ablation.diffusion.families.base.Family`."""

ATTACKS = Registry(
    "attack",
    {
        "soft-prompt": "concept_ablation.evaluation.attacks.soft_prompt:ATTACK",
        "prefix": "concept_ablation.evaluation.attacks.prefix:ATTACK",
    },
)
"""What is learned against a finished model. An entry is a `concept_ablation.evaluation.attacks.base.Attack`."""

DRAWING = ("device", "batch_size")
STAGES = {
    "write_prompts": Stage(
        version=1,
        files={"prompts": "prompts/{key}.json"},
        function="concept_ablation.prompts.stage:write_prompts",
        options=("device", "attempts", "timeout", "key_variable"),
        neutral={"source.language_model.trust_remote_code": False},
    ),
    "search_prompts": Stage(
        version=2,
        files={"prompts": "searches/{key}.json", "record": "searches/{key}.parquet"},
        function="concept_ablation.methods.ablation.prompt_search:search_prompts",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "share_prompts": Stage(
        version=1,
        files={"prompts": "shared/{key}.json"},
        function="concept_ablation.methods.bundles.shared:share_prompts",
    ),
    "generate_anchors": Stage(
        version=2,
        files={"images": "anchors/{key}.parquet"},
        function="concept_ablation.methods.ablation.anchors:generate_anchors",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "ablate_concept": Stage(
        version=4,
        files={
            "delta": "concepts/{key}/delta.safetensors",
            "training": "concepts/{key}/training.parquet",
            "strength": "concepts/{key}/strength.parquet",
        },
        function="concept_ablation.methods.stage:ablate_concept",
        options=("device", "checkpoint_steps"),
        neutral={
            "model.trust_remote_code": False,
            "method": DEFAULT_METHOD,
            "training.preserve": "none",
            "training.start": "none",
            "training.strength": "fixed",
        },
    ),
    "import_delta": Stage(
        version=1,
        files={"delta": "deltas/{key}.safetensors"},
        function="concept_ablation.diffusion.delta_import:import_delta_stage",
        neutral={"model.trust_remote_code": False},
    ),
    "merge_deltas": Stage(
        version=2,
        files={"delta": "bundles/{key}/delta.safetensors"},
        function="concept_ablation.methods.bundles.stage:merge_deltas",
        options=("device",),
        neutral={"model.trust_remote_code": False},
    ),
    "train_bundle": Stage(
        version=1,
        files={"delta": "trained/{key}/delta.safetensors", "training": "trained/{key}/training.parquet"},
        function="concept_ablation.methods.bundles.training:train_bundle",
        options=("device", "checkpoint_steps"),
        neutral={"model.trust_remote_code": False},
    ),
    "repair_bundle": Stage(
        version=1,
        files={"delta": "repaired/{key}/delta.safetensors", "repair": "repaired/{key}/repair.parquet"},
        function="concept_ablation.methods.bundles.repair:repair_bundle",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "sample_base": Stage(
        version=2,
        files={"images": "base/{key}.parquet"},
        function="concept_ablation.diffusion.stages:sample_base",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "sample_ablated": Stage(
        version=2,
        files={"images": "samples/{key}.parquet"},
        function="concept_ablation.evaluation.looks:sample_ablated",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "score_concept": Stage(
        version=6,
        files={"scores": "scores/{key}.parquet", "images": "images/{key}.parquet"},
        function="concept_ablation.evaluation.scoring:score_concept",
        options=("device",),
        neutral={"paraphrases": []},
    ),
    "score_general": Stage(
        version=2,
        files={"scores": "general/{key}.parquet"},
        function="concept_ablation.evaluation.general:score_general",
        options=("device",),
    ),
    "measure_interference": Stage(
        version=1,
        files={"scores": "interference/{key}.parquet", "images": "interference/{key}.images.parquet"},
        function="concept_ablation.evaluation.interference:measure_interference",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "probe_wordings": Stage(
        version=2,
        files={"scores": "wordings/{key}.parquet", "images": "wordings/{key}.images.parquet"},
        function="concept_ablation.evaluation.wordings:probe_wordings",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
    "attack_concept": Stage(
        version=2,
        files={
            "scores": "attacks/{key}.parquet",
            "images": "attacks/{key}.images.parquet",
            "learned": "attacks/{key}.safetensors",
        },
        function="concept_ablation.evaluation.attacks.stage:attack_concept",
        options=DRAWING,
        neutral={"model.trust_remote_code": False},
    ),
}
"""The stages that the plan makes keys for, in the order of the pipeline."""
