"""Bundles: what their work is named by, what is refused before anything runs, and the merged delta itself."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import test_plan
import torch
import yaml
from test_plan import CAT, CONCEPTS_SCHEMA, CONFIG_SCHEMA, INK, ROOT, WEARY, keys
from transformers import AutoTokenizer

from concept_ablation.common.settings import merge as merge_settings
from concept_ablation.diffusion.delta import (
    DeltaError,
    apply_delta,
    delta_parameters,
    load_delta,
    save_delta,
    token_row_name,
)
from concept_ablation.diffusion.delta_export import export_delta
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.preservation import prompts_of_all, second_moment
from concept_ablation.methods.bundles.base import Way
from concept_ablation.methods.bundles.deltas import MergeError
from concept_ablation.methods.bundles.stage import merge_deltas
from concept_ablation.methods.bundles.vocabulary import frequent_words, words_of_targets
from concept_ablation.methods.merging import ClosedForm, add_up
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.schema import ConfigError, check_config, load_schema
from concept_ablation.plan.specs import build_plan, load_plan
from concept_ablation.plan.table import ConceptsError, load_concepts
from concept_ablation.registries import WAYS
from concept_ablation.report.bundle_card import card_of
from concept_ablation.report.bundles import bundle_text, general_text, nested_panels
from concept_ablation.report.card import escape
from concept_ablation.report.figures import curve_figure
from concept_ablation.verdict import NOT_SHOWN
from tests.stages import run_plan
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip
from tests.workflow.conftest import SMALL

config = test_plan.config
OWL = replace(CAT, name="owl", targets=("owl",), anchor="bird", neighbors=("duck",), line=5)
BOTH = [replace(row, bundles=("both",)) for row in (CAT, INK)]


def merged_spec(plan):
    (spec,) = plan.specs["merge_deltas"].values()
    return spec


def test_a_bundle_leaves_the_rows_work_as_it_is(config):
    plain, bundled = build_plan([CAT, INK], config), build_plan(BOTH, config)
    assert keys(plain) == keys(bundled)
    assert not plain.specs["merge_deltas"] and not plain.bundles
    for stage in plain.specs:
        assert plain.specs[stage].items() <= bundled.specs[stage].items()
    for stage in ("generate_anchors", "ablate_concept", "sample_base"):
        more = bundled.specs[stage].keys() - plain.specs[stage].keys()
        assert all(key.startswith("general.") for key in more), "nothing else is drawn or trained"
    (bundle,) = bundled.bundles
    assert bundle.name == "both" and bundle.concepts == ("cat-1", "ink")
    assert bundle.delta.startswith("both.")
    assert bundled.path(bundle.delta) == f"results/bundles/{bundle.delta}/delta.safetensors"


def test_a_bundles_spec_names_the_rows_deltas_and_whose_tokens_count(config):
    plan = build_plan(BOTH, config)
    spec, rows = merged_spec(plan), {row.concept.name: row for row in plan.rows}
    assert spec["deltas"] == sorted(row.ablation for row in rows.values())
    assert [concept["delta"] for concept in spec["concepts"]] == spec["deltas"]
    cat = next(concept for concept in spec["concepts"] if concept["kind"] == "object")
    assert (cat["targets"], cat["anchor"]) == (["pouting cat"], "cat")
    assert cat["neighbors"] == ["weary cat", "crying cat"]
    assert cat["prompts"] == plan.specs["generate_anchors"][rows["cat-1"].anchors]["prompts"]
    (key,) = plan.specs["merge_deltas"]
    assert plan.upstream("merge_deltas", key, "deltas") == [plan.path(k) for k in spec["deltas"]]
    assert plan.upstream("merge_deltas", key, "prompts") == [plan.path(k) for k in spec["prompts"]]
    assert set(spec["deltas"]) <= set(plan.sources(key))


def test_the_order_of_the_rows_is_no_part_of_the_key(config):
    assert merged_spec(build_plan(BOTH, config)) == merged_spec(build_plan(BOTH[::-1], config))


def test_another_row_names_the_bundles_it_is_in_and_no_others(config):
    before = build_plan([*BOTH, replace(OWL, bundles=("birds",))], config)
    after = build_plan([*BOTH, replace(OWL, bundles=("birds", "both"))], config)
    assert keys(before) == keys(after)
    birds, both = ({b.name: b.delta for b in plan.bundles} for plan in (before, after))
    assert birds["birds"] == both["birds"] and birds["both"] != both["both"]


@pytest.mark.parametrize("how", ["sum", "ties"])
def test_a_sum_reads_no_prompts_and_neighbors_name_none(config, how):
    config["bundles"]["how"] = how
    config["training"] |= {"strength": "fixed", "preserve": "none"}
    plan = build_plan(BOTH, config)
    (key,) = plan.specs["merge_deltas"]
    assert plan.upstream("merge_deltas", key, "prompts") == []
    other = [replace(BOTH[0], neighbors=("wry cat",)), BOTH[1]]
    assert build_plan(other, config).specs["merge_deltas"].keys() == {key}
    assert ("density" in merged_spec(plan)) == (how == "ties")


@pytest.mark.parametrize(
    ("name", "value", "hows"),
    [
        ("ridge", 0.5, {"closed-form"}),
        ("preserve_weight", 0.5, {"closed-form"}),
        ("most_prompts", 7, {"closed-form"}),
        ("density", 0.5, {"ties"}),
        ("scale", 0.5, {"closed-form", "sum", "ties"}),
    ],
)
def test_a_setting_names_the_ways_that_it_decides(config, name, value, hows):
    for how in ("closed-form", "sum", "ties"):
        config["bundles"]["named"] = {"both": {"how": how}}
        before = build_plan(BOTH, config).bundles
        config["bundles"]["named"]["both"][name] = value
        assert (build_plan(BOTH, config).bundles != before) == (how in hows), how


def test_all_rows_can_make_a_bundle(config):
    config["bundles"]["all"] = "all"
    (all_rows, both) = build_plan([*BOTH, OWL, replace(WEARY, enabled=False)], config).bundles
    assert (all_rows.name, all_rows.concepts) == ("all", ("cat-1", "ink", "owl"))
    assert both.concepts == ("cat-1", "ink")


def test_scores_and_merged_deltas_stand_for_all_where_each_file_has_to_be_fetched(config):
    config["results"] = "my/scores"  # a folder called so makes no other file one of them
    plan = build_plan(BOTH, config)
    (bundle,) = plan.bundles
    wanted = {plan.path(key) for row in plan.rows for key in row.last} | set(map(plan.path, bundle.ends))
    assert set(plan.small_files()) == wanted and len(plan.pending_files()) > len(wanted)


def test_a_bundle_that_is_not_there_is_a_goal(config):
    config["bundles"]["judge"] = False
    plan = build_plan(BOTH, config)
    for row in plan.rows:
        for file in plan.files(row):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("x")
    plan = build_plan(BOTH, config)
    path = plan.path(plan.bundles[0].delta)
    assert plan.goals() == plan.pending_files() == [path]
    assert plan.summary() == "2 concepts: 2 finished, 0 to do; bundles to do: 1 (both)"
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text("x")
    assert build_plan(BOTH, config).goals() == []


def test_the_report_is_told_every_job_once_and_not_all_of_a_bundle_for_each_row(config):
    """What many rows are merged into, or share, is named by each of them, and what it is made from only where it belongs."""
    config["bundles"]["share_preserved"] = True
    plan = build_plan(BOTH, config)
    told = json.loads(plan.report_spec())
    (bundle,), (one, other) = told["bundles"], told["rows"]
    everything = {f"{stage}/{key}" for key, stage in plan.stages.items()}
    rows = [one, other, *bundle["rows"]]
    assert {job for row in rows for job in row["jobs"]} | set(bundle["jobs"]) == everything
    assert all(len(set(row["jobs"])) == len(row["jobs"]) for row in rows)
    own = {f"ablate_concept/{row.ablation}" for row in plan.rows}
    assert len(own & set(one["jobs"])) == 1 and own <= set(bundle["jobs"])
    assert not any(own & set(row["jobs"]) for row in bundle["rows"])
    shared = {job for job in everything if job.startswith("share_prompts/")}
    assert shared and shared <= set(one["jobs"]) & set(other["jobs"])


def test_a_judged_bundle_draws_its_rows_probes_under_its_delta(config):
    plan = build_plan(BOTH, config)
    (bundle,), rows = plan.bundles, {row.concept.name: row for row in plan.rows}
    assert plan.goals() == sorted(
        [*(plan.path(key) for row in rows.values() for key in row.last), *map(plan.path, bundle.ends[1:])]
    )
    for row in bundle.judged:
        own = rows[row.concept.name]
        ours, theirs = (plan.specs["sample_ablated"][one.samples] for one in (row, own))
        assert ours["delta"] == bundle.delta and theirs["delta"] == own.ablation
        assert ours["probes"] == theirs["probes"] and row.base == own.base
        assert row.scores != own.scores and bundle.delta in plan.needed(row)
    (reported,) = json.loads(plan.report_spec())["bundles"]
    assert [row["delta"] for row in reported["rows"]] == [plan.path(bundle.delta)] * 2
    assert "bundles" not in json.loads(plan.report_spec(plan.rows)), "it isn't finished"


def test_what_a_row_of_the_bundle_removes_is_no_neighbor_to_be_kept(config):
    rows = [replace(row, bundles=("cats",)) for row in (CAT, replace(WEARY, targets=("Crying Cat",)))]
    (bundle,) = build_plan(rows, config).bundles
    neighbors = {row.concept.name: row.concept.neighbors for row in bundle.judged}
    assert neighbors == {"cat-1": ("weary cat",), "cat-2": ()}
    assert {row["concept"]: row["neighbors"] for row in json.loads(build_plan(rows, config).report_spec())["rows"]} == {
        "cat-1": ["weary cat", "crying cat"], "cat-2": ["pouting cat", "crying cat"],
    }  # fmt: skip


class Mean(Way):
    """The mean of all changes, times a factor."""

    name, defaults, schema = "mean", {"factor": 1.0}, {"factor": {"type": "number", "minimum": 0}}

    def merge(self, spec, deltas, rows, pipeline):
        factor = self.settings_of(spec)["factor"] / len(deltas.paths)
        return {name: factor * value for name, value in add_up(deltas.changes()).items()}, {}


MEAN = Mean()


def test_a_new_way_is_a_file_and_a_line(config, folder, pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS.targets, "mean", f"{__name__}:MEAN")
    schema = load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    config["bundles"] |= {"how": "mean", "mean": {"factor": 3.0}}
    check_config(config, schema, "x")
    assert merged_spec(build_plan(BOTH, config))["settings"] == {"factor": 3.0}
    config["bundles"]["named"] = {"both": {"mean": {"factor": 1.0}}}
    assert merged_spec(build_plan(BOTH, config))["settings"] == {}, "a default names nothing"
    config["bundles"]["mean"] = {"factor": -1}
    with pytest.raises(ConfigError, match="bundles.mean.factor: -1 must be at least 0"):
        check_config(config, schema, "x")
    tensors = [changed(pipeline, seed=seed) for seed in (0, 1)]
    values, metadata = merge(folder, tmp_path, tensors, "mean", settings={"factor": 3.0})
    base = delta_parameters(pipeline, tensors[0])
    for name, value in values.items():
        expected = base[name] + 1.5 * sum(own[name] - base[name] for own in tensors)
        assert torch.allclose(value, expected, atol=1e-5)
    assert metadata["settings"]["how"] == "mean"


def test_what_can_not_be_merged_is_told_before_anything_runs(config):
    config["training"]["preserve"] = "none"
    config["training"]["search"]["ladder"] = [{}]
    attn = {"training.parameter_group": "attn"}
    token = {"training.parameter_group": "embedding"}
    rows = [
        replace(BOTH[0], overrides=attn),
        replace(INK, bundles=("inks",)),
        replace(
            CAT,
            name="dog",
            targets=("pouting dog",),
            anchor="dog",
            overrides=token,
            line=7,
            bundles=("words",),
        ),
        replace(WEARY, targets=("pouting cat", "weary cat"), overrides=token, line=8, bundles=("words",)),
    ]
    config["bundles"]["named"] = {"ink": {"how": "sum"}}
    with pytest.raises(PlanError) as caught:
        build_plan(rows, config)
    text = str(caught.value)
    assert "bundles.named.ink: no row's column 'bundle' names it (did you mean 'inks'?)" in text
    assert "concepts.csv:2: bundle 'both': how closed-form merges keys and values of the text" in text
    assert "can be attn (allowed: cross-attn, embedding; or set the bundle's how to sum or ties)" in text
    assert "concepts.csv:8: bundle 'words': trains the embedding of 'pouting', as line 7 does" in text
    config["bundles"]["named"] = {"both": {"how": "sum"}}
    assert build_plan([rows[0], rows[1], rows[2]], config).bundles


def test_the_tables_mistakes_are_told_together(config):
    Path("rows.csv").write_text(
        "kind,target,anchor,bundle\nobject,a,b,one; two\nobject,c,d,One\nobject,e,f,two; two\nobject,g,h,a b\n"
    )
    with pytest.raises(ConceptsError) as caught:
        load_concepts("rows.csv", CONCEPTS_SCHEMA, CONFIG_SCHEMA)
    text = str(caught.value)
    assert "rows.csv:3: column 'bundle': 'One' is 'one' in line 2 (allowed: one spelling)" in text
    assert "rows.csv:4: column 'bundle': 'two' occurs twice" in text
    assert "rows.csv:5: column 'bundle': 'a b' has the wrong form" in text and text.count("\n") == 3


@pytest.mark.parametrize("names", ["every;;thing", ";x", "x;", " ; "])
def test_a_missing_name_in_a_list_of_bundles_is_one_mistake(config, names):
    Path("rows.csv").write_text(f"kind,target,anchor,bundle\nobject,a,b,every\nobject,c,d,{names}\n")
    with pytest.raises(ConceptsError) as caught:
        load_concepts("rows.csv", CONCEPTS_SCHEMA, CONFIG_SCHEMA)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(
        f"  rows.csv:3: column 'bundle': '{names.strip()}' lacks a name beside a ';': write it there"
    )
    assert "leave that ';' out (allowed: names of bundles, each 1 to 64 letters" in line


def test_settings_have_bounds(config):
    config["bundles"] |= {"how": "sums", "ridge": 0, "named": {"both": {"density": 0, "hows": 1}}}
    with pytest.raises(ConfigError) as caught:
        check_config(config, CONFIG_SCHEMA, "x")
    text = str(caught.value)
    for part in (
        "bundles.how: 'sums' is not one of closed-form, sum, ties, joint, sequential",
        "bundles.ridge: 0 must be at least 1e-08",
        "bundles.named.both.density: 0 must be more than 0",
        "bundles.named.both.hows: unknown key",
    ):
        assert part in text


def trained(plan):
    return {spec["targets"][0]: spec for spec in plan.specs["ablate_concept"].values()}


def test_rows_that_share_what_they_preserve_have_one_set(config):
    before = build_plan(BOTH, config)
    config["bundles"]["named"] = {"both": {"share_preserved": True}}
    plan = build_plan([*BOTH, OWL], config)
    cat, ink, owl = (trained(plan)[name] for name in ("pouting cat", "ink", "owl"))
    assert "shared" not in owl and keys(before)["ink"] != keys(plan)["ink"]
    assert cat["shared"] == ink["shared"] and "preserve_prompts" not in cat
    (key,) = plan.specs["share_prompts"]
    spec = plan.specs["share_prompts"][key]
    assert key == cat["shared"] and sorted(row["anchor"] for row in spec["concepts"]) == ["cat", "picture"]
    assert plan.upstream("share_prompts", key, "prompts") == [plan.path(k) for k in spec["prompts"]]
    row = next(row.ablation for row in plan.rows if row.concept.name == "ink")
    assert plan.upstream("ablate_concept", row, "shared") == plan.path(key)
    again = build_plan([*BOTH, replace(OWL, bundles=("both",))], config)
    assert not {keys(plan)["ink"], keys(plan)["cat-1"]} & set(keys(again).values()), "the set has grown"


@pytest.mark.parametrize("preserve", ["none", "null-space"])
def test_a_row_that_preserves_nothing_shares_nothing(config, preserve):
    config["training"] |= {"strength": "fixed", "preserve": preserve}
    config["bundles"]["share_preserved"] = True
    assert all(
        ("shared" in spec) == (preserve != "none") for spec in trained(build_plan(BOTH, config)).values()
    )
    assert not any("shared" in spec for spec in trained(build_plan([CAT, INK], config)).values()), "no bundle"


# The stage, on a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


ROWS = [
    {"kind": "object", "targets": ["owl"], "anchor": "bird", "neighbors": ["duck"], "delta": "owl.1", "prompts": "bird.1", "templates": [], "most_prompts": None},
    {"kind": "object", "targets": ["fox"], "anchor": "animal", "neighbors": ["owl", "dog"], "delta": "fox.1", "prompts": "animal.1", "templates": [], "most_prompts": None},
]  # fmt: skip
PROMPTS = {"bird.1": ["a bird", "a bird on a roof"], "animal.1": ["an animal", "one animal"]}


def merge(folder, tmp_path, tensors, how="closed-form", **settings):
    """Merge deltas of these tensors by the stage; returns what it wrote."""
    deltas, prompts = [], []
    for row, own in zip(ROWS, tensors, strict=True):
        deltas.append(tmp_path / f"{row['delta']}.safetensors")
        save_delta(deltas[-1], own, {})
    for key, texts in PROMPTS.items():
        prompts.append(tmp_path / f"{key}.json")
        prompts[-1].write_text(json.dumps({"prompts": texts}))
    spec = {"bundle": "both", "model": {"path": str(folder), "revision": None}, "how": how, "concepts": ROWS}
    spec |= {"ridge": 1e-4, "preserve_weight": 1.0, "density": 0.5, "scale": 1.0}
    spec |= {"settings": {"vocabulary": 0}} if how == "closed-form" else {}
    spec |= {"prompts": list(PROMPTS), "general": ["a house", "two owls"], **settings}
    out = tmp_path / "out.safetensors"
    merge_deltas(spec, out, deltas=deltas, prompts=prompts, device="cpu")
    return load_delta(out)


def changed(pipeline, group="cross-attn", seed=0):
    """New values of a group, each a little off."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"unet.{name}": value.detach() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in FAMILY.trainable_parameters(pipeline.unet, group).items()
    }


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def test_the_stage_merges_by_the_tokens_of_the_rows_prompts(folder, pipeline, tmp_path):
    tensors = [changed(pipeline, seed=seed) for seed in (0, 1)]
    merged, metadata = merge(folder, tmp_path, tensors)

    def moment(prompts, first):
        return second_moment(
            FAMILY.encode_prompts(pipeline, [prompt]).hidden[:, first:] for prompt in prompts
        )

    base = delta_parameters(pipeline, tensors[0])
    sums = ClosedForm()
    with torch.no_grad():
        for own, prompts in zip(tensors, (["an owl", "an owl on a roof"], ["a fox", "one fox"]), strict=True):
            sums.add(((name, value - base[name]) for name, value in own.items()), moment(prompts, 1))
        kept = ["", "a house", "a bird", "a bird on a roof", "duck", "a duck", "a duck on a roof"]
        kept += ["an animal", "one animal", "dog", "a dog", "one dog"]  # no owl, which another row removes
        expected, fit = sums.solve(moment(kept, 0), 1.0, 1e-4, reach=1.15)
        for name, value in merged.items():
            assert torch.allclose(value, (base[name] + expected[name]).float(), atol=1e-5)
    assert metadata["fit"]["lost"] == pytest.approx(fit.lost, rel=1e-3)
    assert metadata["targets"] == ["owl", "fox"] and metadata["bundle"] == "both"
    assert [concept["delta"] for concept in metadata["concepts"]] == ["owl.1", "fox.1"]
    assert metadata["base_model"] == str(folder) and metadata["settings"]["how"] == "closed-form"


def test_the_vocabulary_is_of_whole_words_without_those_of_targets():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "embedded" / "emoji-diffusion" / "tokenizer")
    rows = [
        {"kind": "object", "targets": ["Pouting cat"]},
        {"kind": "memorization", "targets": ["haunted house album cover"]},
    ]
    words = frequent_words(tokenizer, 3000, words_of_targets(rows))
    assert {"owl", "dog", "pig"} <= set(words) and not {"cat", "pouting", "cover"} & set(words)
    assert len(words) == len(set(words)) > 200 and all(word.isalpha() and len(word) > 2 for word in words)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert frequent_words(tokenizer, 20, words_of_targets(rows)) == words[:20]


@torch.no_grad()
def test_what_no_row_names_moves_less_with_the_vocabulary(folder, pipeline, tmp_path, monkeypatch):
    """Of the tiny model, whose tokenizer has no words: these come from elsewhere."""
    monkeypatch.setattr(
        f"{frequent_words.__module__}.frequent_words", lambda _tokenizer, count, _: ["castle", "moon"][:count]
    )
    tensors, sizes = [changed(pipeline, seed=seed) for seed in (0, 1)], []
    token = FAMILY.encode_prompts(pipeline, ["a picture of a castle"]).hidden[0, 1:]
    for vocabulary in (0, 2):
        values, _ = merge(folder, tmp_path, tensors, settings={"vocabulary": vocabulary, "reach": 1.0})
        base = delta_parameters(pipeline, values)
        sizes.append(
            sum(float((token @ (own - base[name]).T).square().sum()) for name, own in values.items())
        )
    assert sizes[1] < 0.7 * sizes[0]


def test_prompts_that_name_a_target_of_any_row_are_not_preserved():
    found = prompts_of_all(
        [{**row, "anchor_prompts": PROMPTS[row["prompts"]]} for row in ROWS], ["a house", "two owls", "foxes"]
    )
    assert found[:3] == ["a house", "a bird", "a bird on a roof"] and "one dog" in found
    assert not [prompt for prompt in found if "owl" in prompt or "fox" in prompt]


def test_a_sum_adds_what_the_deltas_change_and_a_scale_weighs_it(folder, pipeline, tmp_path):
    tensors = [changed(pipeline, "attn", 0), changed(pipeline, "cross-attn", 1)]
    merged, _ = merge(folder, tmp_path, tensors, "sum", scale=0.5)
    base = delta_parameters(pipeline, tensors[0])
    assert merged.keys() == tensors[0].keys()
    for name, value in merged.items():
        change = sum(own[name] - base[name] for own in tensors if name in own)
        assert torch.allclose(value, base[name] + 0.5 * change, atol=1e-6)
    assert merge(folder, tmp_path, tensors, "ties")[0].keys() == tensors[0].keys()


@pytest.mark.parametrize("how", ["closed-form", "sum", "ties"])
def test_token_rows_join_keys_and_values(folder, pipeline, tmp_path, how):
    row = token_row_name("text_encoder", 70)
    tensors = [changed(pipeline), {row: torch.ones(32)}]
    merged, _ = merge(folder, tmp_path, tensors, how)
    assert merged.keys() == {*tensors[0], row} and torch.allclose(merged[row], torch.ones(32))
    if how == "closed-form":
        rows = [{token_row_name("text_encoder", token): torch.ones(32)} for token in (70, 71)]
        assert merge(folder, tmp_path, rows, how)[0].keys() == {*rows[0], *rows[1]}


def test_what_the_files_can_not_give_is_told(folder, pipeline, tmp_path):
    row = {token_row_name("text_encoder", 70): torch.ones(32)}
    with pytest.raises(
        MergeError, match="owl.1.safetensors and .*fox.1.* both train text_encoder.token_embedding.70"
    ):
        merge(folder, tmp_path, [row, row], "sum")
    with pytest.raises(
        MergeError, match="fox.1.safetensors: changes unet.*attn1.* no key or value of the text"
    ):
        merge(folder, tmp_path, [changed(pipeline), changed(pipeline, "attn")])
    with pytest.raises(DeltaError, match="owl.1.safetensors: 1 of 1 parameters don't fit this model"):
        merge(folder, tmp_path, [{"unet.none": torch.ones(1)}, row], "sum")


@pytest.mark.parametrize("form", ["pipeline", "delta-bin", "compvis", "lora", "kohya"])
def test_a_merged_delta_is_a_delta_like_any_other(folder, pipeline, tmp_path, form):
    merged, metadata = merge(folder, tmp_path, [changed(pipeline, seed=seed) for seed in (0, 1)])
    assert apply_delta(pipeline, tmp_path / "out.safetensors") == metadata
    own = delta_parameters(pipeline, merged)
    assert all(torch.equal(own[name], value) for name, value in merged.items())
    export_delta(tmp_path / "out.safetensors", tmp_path / f"out.{form}", form)
    assert (tmp_path / f"out.{form}").exists()


@torch.no_grad()
def pictures(pipeline):
    draw = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline("an owl", num_inference_steps=3, generator=draw, output_type="pt").images)


def test_a_bundle_as_a_lora_and_as_a_whole_pipeline_draws_the_same_pictures(folder, pipeline, tmp_path):
    """The pipeline exactly; a LoRA within the error that it states, as a share of what the bundle changes."""
    merge(folder, tmp_path, [changed(pipeline, seed=seed) for seed in range(2)])
    delta, bound = tmp_path / "out.safetensors", 1e-3
    base = pictures(pipeline)
    apply_delta(pipeline, delta)
    own = pictures(pipeline)
    export_delta(delta, tmp_path / "whole", "pipeline")
    assert torch.equal(pictures(load_pipeline(tmp_path / "whole", device="cpu")), own)
    assert "relative error" in export_delta(delta, tmp_path / "lora.safetensors", "lora", error=bound)
    plain = load_pipeline(folder, device="cpu")
    plain.load_lora_weights(tmp_path / "lora.safetensors")
    # The error is of weights; pictures follow it, not exactly.
    assert (pictures(plain) - own).norm() < 10 * bound * (base - own).norm()


# The report


def line(concept, **changes):
    found = {"concept": concept, "removed": True, "removed_alone": True, "verdict": "removed, neighbors kept"}
    found |= {"kept": True, "anchor_kept": True, "worst_neighbor": "duck", "anchor": "bird"}
    return found | changes


def test_a_sentence_says_what_came_back_and_what_was_lost():
    lines = [
        line("fox"),
        line("owl", removed=False, kept=None),
        line("ink", removed=False, removed_alone=False),
    ]
    assert bundle_text(lines) == "1 of 3 removed; came back: owl; not removed alone either: ink"
    lines = [line("owl", kept=False), line("fox", anchor_kept=False), line("cat", verdict=NOT_SHOWN)]
    text = "3 of 3 removed; rarely drawn by the base model: cat; neighbors lost: owl (duck); anchor lost: fox (bird)"
    assert bundle_text(lines) == text
    assert bundle_text([line("owl"), line("fox")]) == "2 of 2 removed; all neighbors and anchors kept"


def test_an_anchor_that_another_row_removes_is_told_and_does_not_count():
    lines = [line("fox", anchor_kept=None, anchor_removed_by="animal"), line("animal")]
    assert (
        bundle_text(lines)
        == "2 of 2 removed; anchor removed by another row: fox (bird); all neighbors and anchors kept"
    )


def test_nested_bundles_make_a_curve():
    def bundle(how, *names):
        return [line(name, how=how, removed=name != "owl") for name in names]

    bundles = {
        "a": bundle("sum", "fox", "owl"), "b": bundle("sum", "fox"), "c": bundle("ties", "fox"), "d": bundle("sum", "cat"),
        "e": bundle("sum", "fox", "owl", "cat"),
    }  # fmt: skip
    panels = nested_panels(bundles)
    assert panels["targets removed"] == {"sum": [(1, 1.0), (2, 0.5), (3, pytest.approx(2 / 3))]}
    assert not nested_panels({"b": bundles["b"], "d": bundles["d"]})
    drawn = curve_figure({"<b>": {"sum & more": [(1, 1.0), (10, 0.5)]}})
    assert "<b>" not in drawn and "sum &amp; more" in drawn and drawn.count("<circle") == 2


def test_a_bundle_is_judged_row_by_row_and_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_pipeline(tmp_path / "models" / "pipeline", size=32)
    make_tiny_clip(tmp_path / "models" / "clip")
    (tmp_path / "config").symlink_to(ROOT / "config")
    own = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    for layer in (
        SMALL,
        {
            "concepts": "rows.csv",
            "results": "results",
            "bundles": {"named": {"sums": {"how": "sum"}}, "general": {"images": 6}},
        },
    ):
        merge_settings(own, layer)
    Path("rows.csv").write_text(
        "kind,target,anchor,neighbors,bundle\nobject,fox,animal,owl; dog,both; sums\nobject,owl,bird,duck,both; sums\n"
    )
    plan = load_plan(own, ROOT / "workflow" / "schemas", "config")[1]
    run_plan(plan)
    lines = pq.read_table("results/report/bundles.parquet").to_pylist()
    assert [(each["bundle"], each["how"], each["concept"]) for each in lines] == [
        ("both", "closed-form", "object-fox"), ("both", "closed-form", "object-owl"),
        ("sums", "sum", "object-fox"), ("sums", "sum", "object-owl"),
    ]  # fmt: skip
    assert [each["neighbors"] for each in lines[:2]] == [["dog"], ["duck"]], "the owl is gone"
    summary = {each["concept"]: each for each in pq.read_table("results/report/summary.parquet").to_pylist()}
    for each in lines:
        assert each["verdict_alone"] == summary[each["concept"]]["verdict"]
        assert each["delta"] in [plan.path(bundle.delta) for bundle in plan.bundles]
    card = card_of("results", "both", tmp_path / "card")
    text = (card / "README.md").read_text(encoding="utf-8")
    assert (
        "# models/pipeline without 2 concepts: both" in text
        and f"**{escape(bundle_text(lines[:2]))}**" in text
    )
    assert "| fox | animal | " in text and escape(general_text(lines[0])) in text
    assert len(list((card / "pictures").iterdir())) == 2 and (card / "delta.safetensors").exists()
    assert (
        "**fox** gives **animal**"
        in (card_of("results", "object-fox", tmp_path / "own") / "README.md").read_text()
    )
    page = Path("results/report/index.html").read_text(encoding="utf-8")
    assert general_text(lines[0]) in page and lines[0]["general_images"] == 6
    assert "Bundles: one model without" in page and f">{bundle_text(lines[:2])}.</p>" in page
    again = load_plan(own, ROOT / "workflow" / "schemas", "config")[1]
    assert again.goals() == [] and not again.pending_bundles
    Path(plan.path(plan.bundles[0].judged[0].scores)).unlink()
    again = load_plan(own, ROOT / "workflow" / "schemas", "config")[1]
    assert set(again.goals()) >= {plan.path(plan.bundles[0].judged[0].scores)} and not again.pending
    assert [bundle["name"] for bundle in json.loads(again.report_spec(again.rows))["bundles"]] == ["sums"]
