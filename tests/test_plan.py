"""Keys and specs: equal work has one key, an edit changes its own row's keys and no others."""

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import PlanError, canonical, make_key
from concept_ablation.plan.schema import ConfigError, check_config, load_schema
from concept_ablation.plan.specs import build_plan
from concept_ablation.plan.table import ConceptsError, load_concepts
from concept_ablation.registries import STAGES

ROOT = Path(__file__).parents[1]
CONFIG_SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
CONCEPTS_SCHEMA = load_schema(ROOT / "workflow/schemas/concepts.schema.yaml")
CAT = Concept("cat-1", "object", ("pouting cat",), "cat", ("weary cat", "crying cat"), line=2)
WEARY = Concept("cat-2", "object", ("weary cat",), "cat", ("pouting cat", "crying cat"), line=3)
INK = Concept("ink", "style", ("ink",), "picture", ("neon",), line=4)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The shipped config in a folder of its own, with stand-ins for the models; rows are asked in no other words (test_wordings.py)."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    for name in ("emoji-diffusion", "emoji-clip", "emoji-copy"):
        (tmp_path / "embedded" / name).mkdir(parents=True)
        (tmp_path / "embedded" / name / "weights.safetensors").write_bytes(bytes(1000))
    monkeypatch.chdir(tmp_path)
    made = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    made["evaluation"]["wordings"]["images"] = 0
    return made


@pytest.fixture
def fixed(config):
    """The config with trainings of fixed strength that preserve nothing, which no picture judges: as in the paper."""
    config["training"] |= {"strength": "fixed", "preserve": "none"}
    return config


def keys(plan):
    return {row.concept.name: (row.anchors, row.ablation, row.samples, row.scores) for row in plan.rows}


def test_the_shipped_config_and_table_follow_their_schemas(config):
    assert check_config(config, CONFIG_SCHEMA, "config.yaml") == config
    rows = load_concepts(ROOT / "concepts.csv", CONCEPTS_SCHEMA, CONFIG_SCHEMA)
    kinds = [row.kind for row in rows]
    assert kinds.count("style") >= 2 and kinds.count("object") >= 4
    assert len(build_plan(rows, config).rows) == len(rows)


def test_the_overlay_for_stable_diffusion_plans_the_papers_protocol(config):
    overlay = yaml.safe_load((ROOT / "config/sd14.yaml").read_text())
    merged = _merge(copy.deepcopy(config), overlay)
    assert check_config(merged, CONFIG_SCHEMA, "sd14.yaml") == merged
    rows = load_concepts(ROOT / "config/sd14-concepts.csv", CONCEPTS_SCHEMA, CONFIG_SCHEMA)
    plan = build_plan(rows, merged)
    assert len(plan.rows) == 8
    assert [spec["images"] for spec in plan.specs["generate_anchors"].values()] == [1000] * 5
    assert {spec["sampler"]["steps"] for spec in plan.specs["generate_anchors"].values()} == {200}
    training = {spec["targets"][0]: spec["training"] for spec in plan.specs["ablate_concept"].values()}
    assert training["grumpy cat"]["prior_preservation"] and not training["nemo"]["prior_preservation"]
    paper = {
        "steps": 100,
        "learning_rate": 2e-6,
        "scale_lr": "compvis",
        "batch_size": 8,
        "prior_form": "halved",
    }
    assert all(spec.items() >= paper.items() for spec in training.values())
    assert len(training["van gogh"]["style_templates"]) == 6
    probes = [probe for spec in plan.specs["sample_ablated"].values() for probe in spec["probes"]]
    assert {(probe["role"], probe["images"], len(probe["prompts"])) for probe in probes} == {
        ("target", 200, 10),
        ("anchor", 200, 10),
        ("neighbor", 50, 10),
    }


def test_the_rows_for_stable_diffusion_that_are_switched_off_are_the_published_recipes(config, tmp_path):
    merged = _merge(copy.deepcopy(config), yaml.safe_load((ROOT / "config/sd14.yaml").read_text()))
    table = ROOT / "config/sd14-concepts.csv"
    rows = load_concepts(table, CONCEPTS_SCHEMA, CONFIG_SCHEMA, disabled=True)
    rows = [replace(row, enabled=True) for row in rows if not row.enabled]
    kinds = [row.kind for row in rows]
    assert (kinds.count("memorization"), kinds.count("nudity"), kinds.count("inappropriate")) == (8, 1, 1)
    memorized = [row for row in rows if row.kind == "memorization"]
    with pytest.raises(
        PlanError, match="descriptor.model: there is no folder or file 'models/sscd.*' here.*: put it there"
    ) as told:
        build_plan(memorized[:1], merged)
    assert "1 row(s) can't be planned" in str(told.value) and str(told.value).count("\n") == 1
    merged["evaluation"]["descriptor"] = {"model": "embedded/emoji-copy", "sha256": None}
    with pytest.raises(
        PlanError, match="column 'image': memorized/orleans.png: can't be read: No such"
    ) as told:
        build_plan(memorized[:1], merged)
    assert str(told.value).count("\n") == 1
    (tmp_path / "memorized").mkdir()
    for row in memorized:
        (tmp_path / row.image).write_bytes(row.image.encode())
    plan = build_plan(rows, merged)
    training = {spec["targets"][0]: spec["training"] for spec in plan.specs["ablate_concept"].values()}
    steps = {target: own["steps"] for target, own in training.items()}
    assert steps.pop("Ann Graham Lotz") == 200 and set(steps.values()) == {400}
    assert training["<i>The Long Dark</i> Gets First Trailer, Steam Early Access"]["batch_size"] == 4
    assert training["nudity, nsfw"] == training["violent, horrifying"]
    assert training["nudity, nsfw"]["scale_lr"] == "diffusers" and training["nudity, nsfw"]["batch_size"] == 8
    assert [
        (spec["anchors_wanted"], spec["targets_wanted"]) for spec in plan.specs["search_prompts"].values()
    ] == ([(10, 3)] * 8)
    negative = {spec["negative_prompt"] for spec in plan.specs["generate_anchors"].values()}
    phrases = "violent, horrifying, nudity, nsfw, illegal, shocking, self-harm, harassment"
    assert negative == {None, "nudity, nsfw", phrases}
    targets = {row.concept.kind: row.concept.targets for row in plan.rows}
    assert targets["nudity"] == ("nudity, nsfw",) and len(targets["inappropriate"]) == 4


def _merge(base, overlay):
    for key, value in overlay.items():
        base[key] = _merge(base[key], value) if isinstance(value, dict) and key in base else value
    return base


def test_order_names_and_runtime_settings_leave_keys_alone(config):
    plan = build_plan([CAT, WEARY, INK], config)
    other = copy.deepcopy(config)
    other["runtime"] = {"device": "cpu", "sample_batch_size": 3, "threads": 7}
    again = build_plan([INK, WEARY, CAT], other)
    assert keys(plan) == keys(again) and plan.report_spec() == again.report_spec()
    renamed = build_plan([Concept(**{**vars(CAT), "name": "other", "line": 9})], config).rows[0]
    assert (renamed.ablation, renamed.samples) == (plan.rows[0].ablation, plan.rows[0].samples)


def test_rows_share_anchors_and_base_images(config):
    plan = build_plan([CAT, WEARY], config)
    assert len(plan.specs["generate_anchors"]) == len(plan.specs["write_prompts"]) == 1
    first, second = plan.rows
    assert first.base["cat"] == second.base["cat"] and first.base["crying cat"] == second.base["crying cat"]
    assert first.base["weary cat"] == second.base["weary cat"], (
        "the longer store has the shorter one's pictures"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"targets": ("wry cat",)},
        {"targets": ("pouting cat", "wry cat")},
        {"targets": ("cat",), "anchor": "pouting cat"},
        {"overrides": {"training.steps": 7}},
        {"overrides": {"training.seed": 1}},
        {"preset": "paper"},
    ],
)
def test_an_edited_row_changes_its_own_keys_only(config, change):
    before = keys(build_plan([CAT, INK], config))
    after = keys(build_plan([Concept(**{**vars(CAT), **change}), INK], config))
    assert before["ink"] == after["ink"]
    assert not set(before["cat-1"][1:]) & set(after["cat-1"][1:])


def with_other_neighbors(config):
    """The row CAT before and after its neighbors change."""
    other = Concept(**{**vars(CAT), "neighbors": ("wry cat",)})
    return build_plan([CAT], config).rows[0], build_plan([other], config).rows[0]


def test_neighbors_change_the_evaluation_and_not_an_ablation_that_never_looks_at_them(fixed):
    before, after = with_other_neighbors(fixed)
    assert before.ablation == after.ablation and before.samples != after.samples


@pytest.mark.parametrize(
    "training",
    [{}, {"preserve": "none"}, {"strength": "fixed"}, {"strength": "fixed", "preserve": "distill"}],
)
def test_neighbors_change_an_ablation_that_preserves_them_or_is_judged_by_them(config, training):
    config["training"] |= training
    before, after = with_other_neighbors(config)
    assert before.anchors == after.anchors and before.ablation != after.ablation


def changed_by(config, path, value):
    """The stages of CAT whose keys change when a setting gets this value, and whether the report's do."""
    before = build_plan([CAT], config)
    *groups, last = path.split(".")
    part = config
    for group in groups:
        part = part[group]
    part[last] = value
    after = build_plan([CAT], config)
    stages = {stage for stage in STAGES if before.specs[stage].keys() != after.specs[stage].keys()}
    return stages, before.report_spec() != after.report_spec()


TRAINED = {"ablate_concept", "sample_ablated", "score_concept"}
SAMPLED = {"sample_base", "sample_ablated", "score_concept"}


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("anchors.images", 7, {"generate_anchors", *TRAINED}),
        ("training.steps", 7, TRAINED),
        ("evaluation.sampler.steps", 7, SAMPLED),
        ("evaluation.statistics.bootstrap", 7, {"score_concept"}),
        ("verdict.target_max", 0.5, set()),
    ],
)
def test_a_setting_changes_the_keys_from_its_stage_on(fixed, path, value, stages):
    assert changed_by(fixed, path, value) == (stages, True)


SEARCHING = {
    "training.search.looks": [10],
    "training.search.scales": [0.5],
    "training.search.ladder": [{}],
    "training.search.alpha": 0.01,
    "training.search.images": {"target": 8, "anchor": 8, "neighbor": 8},
    "training.search.batches": 2,
    "training.search.seed": 1,
    "training.search.sampler": {"steps": 5},
    "prompts.validation": None,
}
PRESERVING = {
    "training.preserve_weight": 2.0,
    "training.preserve_tolerance": 0.5,
    "training.preserve_prompts": None,
}


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("evaluation.sampler.steps", 7, SAMPLED),  # a search has a sampler of its own
        ("evaluation.statistics.bootstrap", 7, {"score_concept"}),
        ("verdict.target_max", 0.5, TRAINED),
        ("verdict.anchor_loss_max", 0.4, TRAINED),
        ("verdict.copy_max", 0.5, set()),  # of another kind
        ("verdict.half_width_max", 0.5, set()),  # the search has its own test
    ],
)
def test_how_a_row_is_judged_decides_its_ablation_when_its_strength_is_searched(config, path, value, stages):
    assert changed_by(config, path, value) == (stages, True)


def test_a_search_without_a_sampler_of_its_own_draws_with_the_evaluations(config):
    config["training"]["search"]["sampler"] = None
    assert changed_by(config, "evaluation.sampler.steps", 7) == ({"sample_base", *TRAINED}, True)


@pytest.mark.parametrize(("path", "value"), (SEARCHING | PRESERVING).items())
def test_every_setting_of_search_and_preservation_changes_the_ablation(config, path, value):
    assert changed_by(config, path, value) == (TRAINED, True)


@pytest.mark.parametrize(("path", "value"), (SEARCHING | PRESERVING).items())
def test_no_setting_of_search_and_preservation_names_an_ablation_that_does_neither(fixed, path, value):
    assert changed_by(fixed, path, value) == (set(), False)


def test_an_ablation_that_neither_searches_nor_preserves_is_named_as_before_these_settings(fixed):
    (spec,) = build_plan([CAT], fixed).specs["ablate_concept"].values()
    assert not spec.keys() & {"neighbors", "validation", "search", "preserve_prompts"}
    assert not [name for name in spec["training"] if name.startswith(("preserve", "strength", "search"))]


@pytest.mark.parametrize("name", SEARCHING)
def test_a_search_that_is_not_made_names_no_ablation_that_preserves(config, name):
    config["training"]["strength"] = "fixed"
    assert changed_by(config, name, SEARCHING[name]) == (set(), False)


def test_the_stage_version_is_part_of_the_key(config, monkeypatch):
    before = build_plan([CAT], config).rows[0]
    stage = STAGES["ablate_concept"]
    monkeypatch.setitem(STAGES, "ablate_concept", dataclasses.replace(stage, version=stage.version + 1))
    after = build_plan([CAT], config).rows[0]
    assert before.anchors == after.anchors and before.ablation != after.ablation


def test_a_setting_that_came_later_renames_nothing_at_its_neutral_value(config, monkeypatch):
    before = build_plan([CAT], config)
    stage = STAGES["ablate_concept"]
    neutral = {**stage.neutral, "training.later": 0}
    monkeypatch.setitem(STAGES, "ablate_concept", dataclasses.replace(stage, neutral=neutral))
    config["training"]["later"] = 0
    assert build_plan([CAT], config).specs == before.specs
    config["training"]["later"] = 1
    after = build_plan([CAT], config)
    assert (
        after.rows[0].ablation != before.rows[0].ablation and after.rows[0].anchors == before.rows[0].anchors
    )
    assert after.specs["ablate_concept"][after.rows[0].ablation]["training"]["later"] == 1


def test_a_prompt_files_content_is_part_of_the_key(config, tmp_path):
    own = tmp_path / "own.txt"
    row = Concept(**{**vars(CAT), "prompts": str(own)})
    found = []
    for text in ("a {subject}\n", "the {subject}\n"):
        own.write_text(text)
        found.append(build_plan([row], config).rows[0].anchors)
    assert found[0] != found[1]


WITH_MODEL = {"generate_anchors", "ablate_concept", *SAMPLED}
FIXED = {"training.strength": "fixed", "training.preserve": "none"}


@pytest.mark.parametrize(
    ("row", "settings", "file", "stages"),
    [
        ({}, {}, "embedded/emoji-diffusion/weights.safetensors", WITH_MODEL),
        ({}, {"model.path": "one.ckpt"}, "one.ckpt", WITH_MODEL),
        ({}, {"model.path": "one.ckpt", "model.config": "like"}, "like/vocab.json", WITH_MODEL),
        ({}, {"model.path": "one.ckpt", "model.config": "v1.yaml"}, "v1.yaml", WITH_MODEL),
        ({}, {}, "embedded/emoji-clip/weights.safetensors", TRAINED),
        ({}, FIXED, "embedded/emoji-clip/weights.safetensors", {"score_concept"}),
        (
            {},
            {"evaluation.scorer.model": "ViT-B-32", "evaluation.scorer.pretrained": "w.pt"},
            "w.pt",
            TRAINED,
        ),
        (
            {},
            {"evaluation.scorer.model": "ViT-B-32", "evaluation.scorer.pretrained": "w.pt", **FIXED},
            "w.pt",
            {"score_concept"},
        ),
        (
            {"kind": "inappropriate"},
            {"kinds.inappropriate.evaluation.detector.scorer": {"model": "clip", "pretrained": None}},
            "clip/w.bin",
            TRAINED,
        ),
        (
            {},
            {
                "prompts.source": "language-model",
                "prompts.language_model.path": "llm",
            },
            "llm/chat_template.jinja",
            {"write_prompts", *WITH_MODEL} - {"sample_base"},
        ),
        ({"delta": "d.bin"}, {}, "d.bin", {"import_delta", "sample_ablated", "score_concept"}),
        (
            {"kind": "memorization", "image": "moon.png"},
            {},
            "moon.png",
            {"search_prompts", *WITH_MODEL} - {"sample_base"},
        ),
        (
            {"kind": "memorization", "image": "moon.png"},
            {},
            "embedded/emoji-copy/weights.safetensors",
            {"search_prompts", *WITH_MODEL} - {"sample_base"},
        ),
        (
            {"kind": "memorization", "image": "moon.png"},
            {"evaluation.descriptor.model": "sscd.pt", "evaluation.descriptor.sha256": "0" * 64},
            "sscd.pt",
            {"search_prompts", *WITH_MODEL} - {"sample_base"},
        ),
    ],
)
def test_a_file_replaced_in_place_changes_the_keys_from_the_stages_that_use_it_on(
    config, row, settings, file, stages
):
    for name in (
        "one.ckpt",
        "like/vocab.json",
        "v1.yaml",
        "w.pt",
        "clip/w.bin",
        "d.bin",
        "moon.png",
        "sscd.pt",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"small")
    Path("llm").mkdir()
    for path, value in settings.items():
        *groups, last = path.split(".")
        part = config
        for group in groups:
            part = part.setdefault(group, {})
        part[last] = value
    Path(file).write_bytes(bytes(300_000))
    row = Concept(**{**vars(CAT), **row})
    before = build_plan([row], config)
    with Path(file).open("r+b") as content:  # beyond its first 64 KiB, before its middle and its last
        content.seek(100_000)
        content.write(b"1")
    after = build_plan([row], config)
    changed = {stage for stage in STAGES if before.specs[stage].keys() != after.specs[stage].keys()}
    assert changed == stages


def test_a_model_that_cant_be_read_is_told_with_its_key(config, monkeypatch):
    def refuse(path, keep):
        raise PermissionError(13, "Permission denied", f"{path}/unet")

    monkeypatch.setattr("concept_ablation.plan.model_specs.fingerprint", refuse)
    with pytest.raises(
        PlanError, match="model.path: embedded/emoji-diffusion/unet: can't be read: Permission"
    ):
        build_plan([CAT], config)


def test_a_spec_is_canonical_json_that_names_its_stage(config):
    plan = build_plan([CAT, INK], config)
    for stage, specs in plan.specs.items():
        for key, spec in specs.items():
            text = plan.spec(stage, key)
            assert json.loads(text) == spec and (spec["stage"], spec["version"]) == (
                stage,
                STAGES[stage].version,
            )
            assert make_key(key.rpartition(".")[0], json.loads(text)) == key
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'


def test_a_row_is_finished_when_all_its_files_exist(config):
    plan = build_plan([CAT, INK], config)
    files = plan.files(plan.rows[0])
    for file in files[:-1]:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"x")
    assert [row.concept.name for row in build_plan([CAT, INK], config).pending] == ["cat-1", "ink"]
    Path(files[-1]).parent.mkdir(parents=True, exist_ok=True)
    Path(files[-1]).touch()
    assert len(build_plan([CAT, INK], config).pending) == 2, "an empty file is none"
    Path(files[-1]).write_bytes(b"x")
    again = build_plan([CAT, INK], config)
    assert [row.concept.name for row in again.pending] == ["ink"]
    assert again.summary() == "2 concepts: 1 finished, 1 to do (ink)"
    assert not set(again.pending_files()) & set(files)


def test_finished_rows_that_a_new_one_is_near_are_measured_further_and_not_to_do(config):
    plan = build_plan([CAT, INK], config)
    for file in itertools.chain(*map(plan.files, plan.rows)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"x")
    assert build_plan([CAT, INK], config).summary() == "2 concepts: 2 finished, 0 to do"
    said = build_plan([CAT, INK, WEARY], config).summary()
    assert said.startswith("3 concepts: 2 finished, 1 to do (cat-2); measurements to add to finished ones")
    assert said.endswith(" without new training: 2 (cat-1, ink)")


def test_the_looks_at_a_searched_strength_are_among_a_rows_files_and_no_others(config):
    """So that a storage plugin fetches them for the report, and results without them, of fixed strengths, are whole."""
    fixed = replace(CAT, name="fixed", overrides={"training.strength": "fixed"})
    plan = build_plan([CAT, fixed, replace(INK, preset="paper")], config)
    (looks,) = (file for row in plan.rows for file in plan.files(row) if "strength" in file)
    assert looks == f"results/concepts/{plan.rows[0].ablation}/strength.parquet"
    assert plan.rows[0].concept == CAT and looks in plan.pending_files()
    assert json.loads(plan.report_spec())["rows"][0]["strength"] == looks


MOON = Concept("moon", "memorization", ("The Poster",), "moon", ("sun",), image="moon.png", line=5)
ANGRY = Concept("angry", "inappropriate", ("angry", "furious"), "face", ("robot",), line=6)


def test_a_memorized_picture_is_searched_for_before_its_anchors_are_drawn(config, tmp_path):
    (tmp_path / "moon.png").write_bytes(b"one")
    plan = build_plan([MOON], config)
    (search,), (anchors,) = (plan.specs[stage].values() for stage in ("search_prompts", "generate_anchors"))
    assert not plan.specs["write_prompts"] and anchors["prompts"] in plan.specs["search_prompts"]
    assert search["image"] == anchors["image"] and search["descriptor"]["fingerprint"]
    (key,) = plan.specs["search_prompts"]
    assert plan.upstream("search_prompts", key, "candidates_from") == [], "no prompts of a language model"
    assert "The Poster" not in search["candidates"], "the caption itself is tried in any case"
    assert any("moon" in text for text in search["candidates"])
    (training,) = (spec["training"] for spec in plan.specs["ablate_concept"].values())
    assert training["augmentation"] == "none"
    probes = {
        probe["subject"]: probe["prompts"]
        for probe in next(iter(plan.specs["sample_ablated"].values()))["probes"]
    }
    assert probes["The Poster"] == ["The Poster"], "the caption alone is judged"
    others = probes["paraphrases of The Poster"]
    assert len(others) > 1 and all("The Poster" in text and text != "The Poster" for text in others)
    assert "the sun" in probes["sun"]
    (judged,) = plan.specs["score_concept"].values()
    assert judged["paraphrases"] == ["paraphrases of The Poster"]
    assert list(judged["base"]) == ["The Poster", "paraphrases of The Poster", "moon", *MOON.neighbors]
    (row,) = json.loads(plan.report_spec())["rows"]
    assert row["paraphrases"] == ["paraphrases of The Poster"]
    (tmp_path / "moon.png").write_bytes(b"two")
    assert build_plan([MOON], config).rows[0].ablation != plan.rows[0].ablation
    (tmp_path / "moon.png").unlink()
    with pytest.raises(PlanError, match=r"concepts.csv:5: column 'image': moon.png: can't be read"):
        build_plan([MOON], config)


def test_unsafe_terms_are_the_anchors_negative_prompt_and_have_a_detector(config):
    plan = build_plan([ANGRY], config)
    (anchors,), (ablation,), (scores,) = (
        plan.specs[stage].values() for stage in ("generate_anchors", "ablate_concept", "score_concept")
    )
    assert anchors["negative_prompt"] == "angry, furious"
    assert ablation["validation"]["detector"] == scores["detector"], "the search judges as the report does"
    assert ablation["validation"]["limits"].keys() >= {"detected_max", "anchor_loss_max"}
    (published,) = build_plan([replace(ANGRY, preset="paper")], config).specs["ablate_concept"].values()
    assert published["training"]["group"] == "attn" and published["training"]["prior_preservation"]
    assert "validation" not in published
    assert scores["detector"] == {
        "type": "zero-shot",
        "scorer": None,
        "unsafe": ["an angry", "a furious"],
        "safe": ["a face", "a robot"],
    }


def test_a_row_with_a_delta_trains_nothing(config, tmp_path):
    (tmp_path / "their.bin").write_bytes(b"weights")
    plan = build_plan([Concept(**{**vars(CAT), "delta": "their.bin"})], config)
    assert not plan.specs["ablate_concept"] and not plan.specs["generate_anchors"]
    (key,) = plan.specs["import_delta"]
    assert plan.rows[0].ablation == key and plan.upstream(
        "sample_ablated", plan.rows[0].samples, "delta"
    ) == (f"results/deltas/{key}.safetensors")
    assert json.loads(plan.report_spec())["rows"][0]["training"] is None


def test_later_layers_win(config):
    def training(**row):
        return next(
            iter(build_plan([Concept(**{**vars(INK), **row})], config).specs["ablate_concept"].values())
        )["training"]

    config["kinds"]["style"]["training"] = {"steps": 11, "batch_size": 3}
    assert (training()["steps"], training()["batch_size"]) == (11, 3)
    assert training(preset="paper")["steps"] == 100
    config["presets"]["paper"]["kinds"]["style"]["training"] = {"steps": 12}
    assert training(preset="paper")["steps"] == 12
    assert training(preset="paper", overrides={"training.steps": 13})["steps"] == 13
    config["preset"] = "paper"
    assert training()["steps"] == 12 and training(preset="default")["steps"] == 11
    with pytest.raises(PlanError, match="concepts.csv:4: preset 'papper' is unknown .did you mean 'paper'"):
        training(preset="papper")


def test_prompts_of_a_language_model_are_a_rows_own(config):
    row = Concept(**{**vars(CAT), "overrides": {"prompts.source": "endpoint"}})
    with pytest.raises(PlanError, match="needs prompts.endpoint.base_url and prompts.endpoint.model in"):
        build_plan([row], config)
    config["prompts"]["endpoint"] |= {"model": "m", "base_url": "http://localhost:1/v1"}
    (spec,) = build_plan([row], config).specs["write_prompts"].values()
    assert spec["source"]["endpoint"]["model"] == "m" and spec["targets"] == ["pouting cat"]


@pytest.mark.parametrize("preset", ["default", "paper", "diffusers"])
def test_a_search_draws_with_its_own_sampler_whatever_draws_the_anchors(config, tmp_path, preset):
    (tmp_path / "moon.png").write_bytes(b"one")
    config["preset"] = preset
    config["kinds"]["memorization"]["prompts"]["search"] = {"sampler": {"steps": 7}}
    plan = build_plan([MOON], config)
    (search,), (anchors,) = (plan.specs[stage].values() for stage in ("search_prompts", "generate_anchors"))
    assert search["sampler"] == config["prompts"]["search"]["sampler"] | {"steps": 7}
    recipe = config["presets"][preset].get("anchors", {}).get("sampler", {})
    assert anchors["sampler"] == config["anchors"]["sampler"] | recipe


def test_the_overlay_for_stable_diffusion_searches_with_25_steps(config, tmp_path):
    (tmp_path / "moon.png").write_bytes(b"one")
    merged = _merge(copy.deepcopy(config), yaml.safe_load((ROOT / "config/sd14.yaml").read_text()))
    merged["evaluation"]["descriptor"] = config["evaluation"]["descriptor"]
    plan = build_plan([MOON], merged)
    (search,), (anchors,) = (plan.specs[stage].values() for stage in ("search_prompts", "generate_anchors"))
    expected = {"scheduler": "dpmsolver++", "steps": 25, "guidance_scale": 6.0, "eta": 0.0}
    assert search["sampler"].items() >= expected.items() and search["anchors_wanted"] == 10
    assert anchors["sampler"]["steps"] == 200


def test_a_language_models_prompts_are_more_candidates_for_a_search(config, tmp_path):
    (tmp_path / "moon.png").write_bytes(b"one")
    config["prompts"]["endpoint"] |= {"model": "m", "base_url": "http://localhost:1/v1"}
    plan = build_plan([Concept(**{**vars(MOON), "overrides": {"prompts.source": "endpoint"}})], config)
    (key,), (written,) = plan.specs["search_prompts"], plan.specs["write_prompts"]
    assert plan.upstream("search_prompts", key, "candidates_from") == f"results/prompts/{written}.json"


def test_what_holds_for_the_whole_table_is_no_column_and_no_part_of_a_preset(config):
    overlay = copy.deepcopy(config)
    overlay["presets"]["paper"]["verdict"] = {"target_max": 0.5}
    with pytest.raises(ConfigError, match="presets.paper.verdict: unknown key"):
        check_config(overlay, CONFIG_SCHEMA, "x")
    (Path.cwd() / "rows.csv").write_text("kind,target,anchor,verdict.target_max\nobject,a,b,0.5\n")
    with pytest.raises(ConceptsError, match="unknown column 'verdict.target_max'"):
        load_concepts("rows.csv", CONCEPTS_SCHEMA, CONFIG_SCHEMA)


def test_problems_name_the_row_and_the_file(config):
    rows = [
        Concept(**{**vars(CAT), "prompts": "none.txt"}),
        Concept(**{**vars(INK), "anchor": "sculpture"}),
    ]
    with pytest.raises(PlanError) as caught:
        build_plan(rows, config)
    assert "concepts.csv:2: none.txt: can't be read" in str(caught.value)
    assert "concepts.csv:4: config/prompts/sculpture.txt: can't be read" in str(caught.value), "before others"
    config["model"] = {"path": "nobody/nothing", "revision": None, "config": None}
    with pytest.raises(PlanError, match="model.path: there is no folder or file 'nobody/nothing' here"):
        build_plan([CAT], config)


def test_a_missing_file_of_validation_prompts_is_told_with_what_to_do(config):
    for folder in ("", "eval/"):
        file = Path(f"own/{folder}sculpture.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a sculpture\n")
    config["kinds"]["style"]["prompts"] |= {
        "training": "own/{anchor}.txt",
        "evaluation": "own/eval/{anchor}.txt",
        "validation": "own/validation/{anchor}.txt",
    }
    row = replace(INK, anchor="sculpture")
    with pytest.raises(PlanError) as caught:
        build_plan([row], config)
    assert "concepts.csv:4: prompts.validation: there is no file own/validation/sculpture.txt" in str(
        caught.value
    )
    assert "write it, or set prompts.validation to null" in str(caught.value)
    config["kinds"]["style"]["prompts"]["validation"] = None
    (spec,) = build_plan([row], config).specs["ablate_concept"].values()
    (samples,) = build_plan([row], config).specs["sample_ablated"].values()
    for looked, drawn in zip(spec["validation"]["probes"], samples["probes"], strict=True):
        assert looked["prompts"][0] == drawn["prompts"][0] and looked["seed"] != drawn["seed"]
    config["kinds"]["style"]["prompts"]["validation"] = "own/validation/{anchor}.txt"
    config["training"]["strength"] = "fixed"
    assert build_plan([row], config).rows, "nobody reads it"


@pytest.mark.parametrize("group", ["attn", "full-weight", "embedding"])
def test_a_null_space_is_refused_where_not_only_keys_and_values_of_the_text_are_trained(config, group):
    def plan(ladder=({},), **training):
        config["training"] |= training
        config["training"]["search"]["ladder"] = list(ladder)
        return build_plan([replace(CAT, overrides={"training.parameter_group": group})], config)

    for strength, preserve in itertools.product(("auto", "fixed"), ("null-space", "both")):
        with pytest.raises(PlanError) as caught:
            plan(strength=strength, preserve=preserve)
        said = f"concepts.csv:2: training.preserve {preserve} needs training.parameter_group cross-attn, not {group}"
        assert said in str(caught.value) and f"(allowed with {group}: none, distill)" in str(caught.value)
    for strength, preserve in itertools.product(("auto", "fixed"), ("none", "distill")):
        assert plan(strength=strength, preserve=preserve).rows
    ladder = [{}, {"preserve": "both"}]
    with pytest.raises(
        PlanError, match=r"concepts.csv:2: training.search.ladder, rung 2: training.preserve both needs"
    ):
        plan(ladder, strength="auto", preserve="none")
    assert plan(ladder, strength="fixed", preserve="none").rows, "which climbs no ladder"
    assert plan([{"parameter_group": "cross-attn"}], strength="auto", preserve="both").rows


def test_a_rung_of_the_ladder_may_not_leave_the_null_space_behind(config):
    config["training"]["search"]["ladder"] = [{}, {"parameter_group": "full-weight"}]
    with pytest.raises(
        PlanError, match="rung 2: training.preserve null-space needs .* cross-attn, not full-weight"
    ):
        build_plan([CAT], config)
    config["training"]["search"]["ladder"][1]["preserve"] = "distill"
    assert build_plan([CAT], config).rows


def test_an_edited_prompt_file_is_read_again_though_its_size_and_time_stay(config):
    file = Path("own.txt")
    file.write_text("a cat on a mat\n")
    row = Concept(**{**vars(CAT), "prompts": "own.txt"})
    before, when = keys(build_plan([row], config)), file.stat()
    file.write_text("a cat on a hat\n")
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert keys(build_plan([row], config)) != before


def test_rows_share_no_setting_that_one_of_them_changes(config):
    rows = [CAT, Concept(**{**vars(WEARY), "overrides": {"training.steps": 7, "anchors.sampler.steps": 9}})]
    plan = build_plan(rows, config)
    steps = {spec["targets"][0]: spec["training"]["steps"] for spec in plan.specs["ablate_concept"].values()}
    assert steps == {"pouting cat": config["training"]["steps"], "weary cat": 7}
    assert sorted(spec["sampler"]["steps"] for spec in plan.specs["generate_anchors"].values()) == [8, 9]


def test_an_unfinished_rows_scores_stand_for_all_its_files_unless_they_are_there(config):
    plan = build_plan([CAT, INK], config)
    cat, ink = plan.rows
    assert plan.goals() == sorted(plan.path(key) for key in (*cat.last, *ink.last))
    for file in plan.files(cat):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("x")
    assert build_plan([CAT, INK], config).goals() == sorted(map(plan.path, ink.last))
    Path(plan.path(cat.samples)).unlink()
    again = build_plan([CAT, INK], config).goals()
    assert set(again) == {*plan.files(cat), *map(plan.path, ink.last)}


def test_every_stage_has_a_path_of_its_own():
    paths = [path for stage in STAGES.values() for path in stage.files.values()]
    assert len(set(paths)) == len(paths) and all("{key}" in path for path in paths)


def test_planning_imports_no_heavy_library():
    code = """import sys
from concept_ablation.plan.checks import check_rows, read_table
for configfiles in ([], ["config/sd14.yaml"]):
    config, plan = read_table(configfiles)
    check_rows(plan, plan.rows, config)
print({"torch", "pandas", "transformers", "diffusers", "pyarrow", "PIL"} & set(sys.modules))"""  # numpy finds near words
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
