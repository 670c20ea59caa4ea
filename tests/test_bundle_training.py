"""Bundles that are trained: what names and refuses them, the trainings on a tiny model, and the repair of what came back."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import test_plan
import torch
from test_plan import CAT, INK
from test_strength import finding
from test_training import PICTURES, PROMPTS, spec
from tiny import make_tiny_pipeline

from concept_ablation.common.image_store import write_store
from concept_ablation.diffusion.delta import delta_parameters, load_delta, save_delta
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.training import Training
from concept_ablation.methods.bundles import repair, training
from concept_ablation.methods.bundles.repair import repair_bundle
from concept_ablation.methods.bundles.training import train_bundle
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.specs import build_plan
from concept_ablation.registries import WAYS

config = test_plan.config
BOTH = [replace(row, bundles=("both",)) for row in (CAT, INK)]


# The plan


@pytest.mark.parametrize("how", ["joint", "sequential"])
def test_a_trained_bundle_reads_pictures_and_prompts_and_no_delta(config, how):
    config["bundles"] |= {"how": how, "training": {"steps": 7, "preserve_tolerance": 0.5}}
    plan = build_plan(BOTH, config)
    (bundle,) = plan.bundles
    own = plan.specs["train_bundle"][bundle.delta]
    anchors = sorted(row.anchors for row in plan.rows)
    assert own["anchors"] == anchors and "deltas" not in own and own["training"]["steps"] == 7
    assert plan.upstream("train_bundle", bundle.delta, "anchors") == [plan.path(key) for key in anchors]
    assert plan.path(bundle.delta) == f"results/trained/{bundle.delta}/delta.safetensors"
    assert not plan.specs["merge_deltas"]
    again = build_plan(BOTH[::-1], config)
    assert again.specs["train_bundle"] == plan.specs["train_bundle"]
    assert again.spec("train_bundle", bundle.delta) == plan.spec("train_bundle", bundle.delta)


def test_the_rows_own_settings_count_where_the_bundle_has_none(config):
    config["bundles"] |= {"how": "joint", "training": {"steps": 7, "preserve_tolerance": 0.5}}
    plan = build_plan([replace(row, overrides={"training.learning_rate": 5e-4}) for row in BOTH], config)
    (own,) = plan.specs["train_bundle"].values()
    assert own["training"]["learning_rate"] == 5e-4 and own["training"]["group"] == "cross-attn"


def test_what_can_not_be_trained_together_is_told_before_anything_runs(config):
    config["bundles"] |= {"how": "joint"}
    rows = [
        BOTH[0],
        replace(INK, line=3, overrides={"training.batch_size": 3}, bundles=("both",)),
        replace(CAT, name="a", line=4, delta=str(test_plan.ROOT / "README.md"), bundles=("both",)),
        replace(CAT, name="b", line=5, overrides={"training.parameter_group": "attn", "training.preserve": "none"}, bundles=("both",)),
    ]  # fmt: skip
    with pytest.raises(PlanError) as caught:
        build_plan(rows, config)
    text = str(caught.value)
    assert (
        "training.batch_size is 3 here and 16 in line 2 (allowed: one value; or set bundles.training.batch_size)"
        in text
    )
    assert (
        ":4: bundle 'both': how joint trains on a row's anchor pictures, and this row brings its delta"
        in text
    )
    assert (
        ":5: bundle 'both': how joint: training.preserve null-space needs training.parameter_group cross-attn"
        in text
    )
    config["bundles"] |= {"training": {**config["bundles"]["training"], "batch_size": 4}}
    assert build_plan(rows[:2], config).bundles


def test_settings_of_repair_enter_a_spec_only_where_it_is_on(config):
    before = build_plan(BOTH, config)
    config["bundles"]["repair_steps"] = 3
    assert build_plan(BOTH, config).specs == before.specs
    config["bundles"]["repair"] = True
    plan = build_plan(BOTH, config)
    (bundle,), (old,) = plan.bundles, before.bundles
    own = plan.specs["repair_bundle"][bundle.delta]
    assert own["source"] == old.delta and old.delta in plan.specs["merge_deltas"]
    assert own["training"]["steps"] == 3 and bundle.how == "closed-form, repaired"
    report = {probe["seed"] for probe in plan.specs["sample_ablated"][bundle.judged[0].samples]["probes"]}
    for row in own["concepts"]:
        assert not report & {probe["seed"] for probe in row["validation"]["probes"]}


def test_repair_trains_keys_and_values_alone(config):
    config["bundles"] |= {"how": "sum", "repair": True, "training": {"preserve": "distill"}}
    changes = {
        "training.parameter_group": "attn",
        "training.preserve": "distill",
        "training.strength": "fixed",
    }
    with pytest.raises(
        PlanError, match=r"repair trains keys and values of the text, and .* is attn \(allowed: cross-attn\)"
    ):
        build_plan([replace(row, overrides=changes) for row in BOTH], config)


def test_an_anchor_that_another_row_removes_need_not_be_kept(config):
    config["bundles"]["repair"] = True
    other = replace(
        CAT, name="cats", targets=("Cat",), anchor="animal", neighbors=("dog",), line=9, bundles=("both",)
    )
    plan = build_plan([*BOTH, other], config)
    (bundle,) = plan.bundles
    assert bundle.anchors_gone == {"cat-1": "cats"}
    (own,) = plan.specs["repair_bundle"].values()
    limits = {row["concept"]: row["validation"]["limits"]["anchor_loss_max"] for row in own["concepts"]}
    assert limits == {"cat-1": 1.0, "ink": 0.5, "cats": 0.5}


def test_neutral_prompts_name_no_target_of_the_bundle_and_bundles_share_them(config):
    one = build_plan(BOTH, config)
    rows = [*BOTH, replace(CAT, name="frog", targets=("frog",), line=9, bundles=("both",))]
    two = build_plan(rows, config)
    probes = [
        {key: spec["probe"] for key, spec in plan.specs["sample_base"].items() if key.startswith("general.")}
        for plan in (one, two)
    ]
    assert [len(own) for own in probes] == [2, 2]
    first, second = one.specs["score_general"][one.bundles[0].general], probes[0]
    assert second[first["base"]]["prompts"] == second[first["other"]]["prompts"]
    seeds = [
        range(second[first[name]]["seed"], second[first[name]]["seed"] + 48) for name in ("base", "other")
    ]
    assert not set(seeds[0]) & set(seeds[1])
    words = [{p for probe in own.values() for p in probe["prompts"]} for own in probes]
    assert words[0] - words[1] == {"look at a frog"}
    config["bundles"]["general"]["prompts"] = None
    assert build_plan(BOTH, config).bundles[0].general is None


def test_neutral_prompts_stand_in_no_other_file():
    own = set((test_plan.ROOT / "config/prompts/eval/neutral.txt").read_text().splitlines())
    for path in (test_plan.ROOT / "config/prompts").rglob("*.txt"):
        if path.name != "neutral.txt":
            assert not {line for line in own if line[:1] != "#"} & set(path.read_text().splitlines()), path


# The trainings, on a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


ROWS = [
    {"kind": "object", "targets": ["owl"], "anchor": "cat", "neighbors": ["duck"], "anchors": "bird.1"},
    {"kind": "object", "targets": ["fox"], "anchor": "cat", "neighbors": ["dog"], "anchors": "bird.2"},
]


def make_spec(folder, how, **changes):
    own = spec(folder)
    settings = {**own["training"], "steps": 2, "preserve": "distill", "preserve_weight": 1.0, **changes}
    rows = [{**row, "prompts": "p", "templates": [], "most_prompts": None} for row in ROWS]
    named = {
        "bundle": "both",
        "how": how,
        "model": own["model"],
        "scale": 1.0,
        "seed": 0,
        "training": settings,
    }
    return {
        **named,
        "anchors": ["bird.1", "bird.2"],
        "prompts": ["p"],
        "general": ["a house"],
        "concepts": rows,
    }


def files(tmp_path):
    """The anchors' pictures, the second row's in reverse, and the prompts of both."""
    stores = []
    for number, pictures in enumerate((PICTURES, PICTURES[::-1])):
        rows = [
            {"image": p, "prompt": q, "seed": 0, "index": 0} for p, q in zip(pictures, PROMPTS, strict=True)
        ]
        stores.append(tmp_path / f"{number}.parquet")
        write_store(stores[-1], rows, {})
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": list(PROMPTS)}))
    return stores, [tmp_path / "prompts.json"]


def train(folder, tmp_path, how, steps=0, **changes):
    out = tmp_path / "results" / "trained" / "key"
    out.mkdir(parents=True, exist_ok=True)
    paths = out / "delta.safetensors", out / "training.parquet"
    train_bundle(
        make_spec(folder, how, **changes), *files(tmp_path), *paths, device="cpu", checkpoint_steps=steps
    )
    tensors, metadata = load_delta(paths[0])
    return tensors, metadata, pq.read_table(paths[1]).to_pylist()


def test_joint_training_draws_from_the_pictures_of_all_rows(folder, tmp_path, monkeypatch):
    seen = []
    real = training.begin

    def begin(pipeline, lessons, rows, *more):
        data, targets = lessons.data(rows)
        seen.append((len(data.prompts), {prompt for own in targets for prompt in own}))
        return real(pipeline, lessons, rows, *more)

    monkeypatch.setattr(training, "begin", begin)
    _, metadata, records = train(folder, tmp_path, "joint")
    ((count, prompts),) = seen
    assert count == 2 * len(PROMPTS) and any("owl" in p for p in prompts) and any("fox" in p for p in prompts)
    assert len(records) == 4, "the steps are a row's"
    assert metadata["targets"] == ["owl", "fox"] and metadata["settings"]["how"] == "joint"


def test_sequential_training_goes_row_by_row_and_keeps_what_the_rows_before_left(
    folder, tmp_path, monkeypatch
):
    seen = []
    real = training.begin

    def begin(pipeline, lessons, rows, settings, seed, preserved):
        seen.append(([row["targets"][0] for row in rows], list(preserved)))
        return real(pipeline, lessons, rows, settings, seed, preserved)

    monkeypatch.setattr(training, "begin", begin)
    _, _, records = train(folder, tmp_path, "sequential")
    assert [names for names, _ in seen] == [["owl"], ["fox"]] and [r["part"] for r in records] == [0, 0, 1, 1]
    shared = seen[0][1]
    assert "a house" in shared and not any("owl" in p or "fox" in p for p in shared)
    more = seen[1][1][len(shared) :]
    assert more and all("owl" in p for p in more)


@pytest.mark.parametrize("how", ["joint", "sequential"])
def test_a_killed_training_of_a_bundle_ends_as_one_that_was_not(folder, tmp_path, monkeypatch, how):
    whole, _, records = train(folder, tmp_path, how)
    take, left = Training._take_step, [3]

    def killed(self):
        left[0] -= 1
        if left[0] < 0:
            left[0] = 10**6
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Training, "_take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, how, steps=1)
    assert (tmp_path / "results" / "checkpoints" / "key.pt").exists()
    again, _, after = train(folder, tmp_path, how, steps=1)
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert [r["loss"] for r in after] == [r["loss"] for r in records]
    assert not (tmp_path / "results" / "checkpoints" / "key.pt").exists()


# Repair: judged by findings that are given, since what a tiny model draws means nothing


def repaired(folder, tmp_path, monkeypatch, findings):
    """Repair a bundle whose judging finds `findings`, round by round; its tensors before and after, the record, what was trained."""
    pipeline = load_pipeline(folder, device="cpu")
    names = [
        f"unet.{n}" for n, _ in pipeline.unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n
    ]
    start = {name: value.detach() + 0.05 for name, value in delta_parameters(pipeline, names).items()}
    save_delta(tmp_path / "source.safetensors", start, {"targets": ["owl", "fox"]})
    own = make_spec(folder, "joint")
    limits = {"anchor_loss_max": 0.5, "neighbor_loss_max": 0.05, "worst_neighbor_loss_max": 0.5}
    for row in own["concepts"]:
        row |= {"concept": row["targets"][0], "validation": {"alpha": 0.05}}
    trained, real, left = [], repair.begin, list(findings)

    class Judge:
        def __init__(self, row, *_):
            self.limits = type("Limits", (), limits)

        def look(self, spending):
            return left[0].pop(0) if left[0] else (left.pop(0), left[0].pop(0))[1]

    def begin(pipeline, lessons, rows, *more):
        base = load_pipeline(folder, device="cpu")
        now = delta_parameters(pipeline, names)
        assert all(torch.equal(now[name], value) for name, value in delta_parameters(base, names).items()), (
            "what was lost is held to the unchanged model"
        )
        trained.append([row["concept"] for row in rows])
        return real(pipeline, lessons, rows, *more)

    monkeypatch.setattr(repair, "Validation", Judge)
    monkeypatch.setattr(repair, "begin", begin)
    out = tmp_path / "delta.safetensors", tmp_path / "repair.parquet"
    repair_bundle(own, tmp_path / "source.safetensors", *files(tmp_path), *out, device="cpu")
    tensors, metadata = load_delta(out[0])
    return start, tensors, metadata, pq.read_table(out[1]).to_pylist(), trained


GOOD, BACK = finding(0.0, 0.0), finding(0.7, 0.0)


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_bundle_whose_rows_all_pass_is_left_alone(folder, tmp_path, monkeypatch):
    start, tensors, metadata, lines, trained = repaired(folder, tmp_path, monkeypatch, [[GOOD, GOOD]])
    assert same(start, tensors) and trained == [] and metadata["repaired"] == 0
    assert {line["round"] for line in lines} == {0} and len(lines) == 8


def test_what_came_back_is_trained_and_judged_again(folder, tmp_path, monkeypatch):
    start, tensors, metadata, lines, trained = repaired(
        folder, tmp_path, monkeypatch, [[GOOD, BACK], [GOOD, GOOD]]
    )
    assert trained == [["fox"]] and not same(start, tensors) and metadata["repaired"] == 1
    (line,) = [one for one in lines if (one["round"], one["concept"], one["role"]) == (1, "fox", "target")]
    assert line["trained"] and line["taken"]
    assert line["before"] == BACK.target_share and line["after"] == GOOD.target_share


def test_a_round_that_does_not_help_is_undone_and_the_last(folder, tmp_path, monkeypatch):
    worse = [BACK, BACK]
    start, tensors, metadata, lines, trained = repaired(folder, tmp_path, monkeypatch, [[GOOD, BACK], worse])
    assert trained == [["fox"]] and same(start, tensors) and metadata["repaired"] == 0
    assert not any(line["taken"] for line in lines if line["round"] == 1)


def test_there_are_two_rounds_at_most(folder, tmp_path, monkeypatch):
    near, nearer = replace(BACK, excess=0.4), replace(BACK, excess=0.3)
    found = [[BACK, BACK], [near, near], [nearer, nearer], [GOOD, GOOD]]
    *_, trained = repaired(folder, tmp_path, monkeypatch, found)
    assert trained == [["owl", "fox"]] * 2


def test_every_way_says_what_it_reads():
    assert {name: way.reads for name, way in WAYS.items()}["closed-form"] == ("deltas", "prompts")
    assert all(set(way.reads) <= {"deltas", "prompts", "anchors"} for way in WAYS.values())
