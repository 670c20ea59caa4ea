"""One store of the base model's pictures a subject: a neighbor's are the first ones of another row's target."""

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.common.image_store import read_store
from concept_ablation.common.settings import merge
from concept_ablation.diffusion import sampler as sampling
from concept_ablation.diffusion import stages
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.snapshot import load_snapshot, save_snapshot
from concept_ablation.plan.specs import build_plan
from concept_ablation.plan.stores import begins
from concept_ablation.report.card_files import find_base
from tests.stages import run_stages
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip
from tests.workflow.conftest import SMALL

ROOT = Path(__file__).parents[1]
OWL = Concept("owl", "object", ("owl",), "bird", ("duck", "hen"), line=2)
DUCK = Concept("duck", "object", ("duck",), "bird", ("hen",), line=3)
BIRD = Concept("bird", "object", ("bird",), "animal", ("hen",), line=4)
IMAGES = {"target": 7, "anchor": 4, "neighbor": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    (folder / "config").symlink_to(ROOT / "config")
    make_tiny_pipeline(folder / "models" / "pipeline", size=32)
    make_tiny_clip(folder / "models" / "clip")
    return folder


@pytest.fixture
def plan_of(folder, monkeypatch):
    """`plan_of(*rows, results=...)`: the plan of few pictures of tiny models."""
    monkeypatch.chdir(folder)

    def planned(*rows, results="results"):
        config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
        merge(config, copy.deepcopy(SMALL))
        merge(config, {"evaluation": {"images": IMAGES}})
        return build_plan(list(rows), config | {"results": str(folder / results)})

    return planned


def row_of(plan, name):
    return next(row for row in plan.rows if row.concept.name == name)


def keys(row):
    return row.anchors, row.ablation, row.samples, row.scores, *row.attacks


def test_a_neighbor_is_read_from_another_rows_target_and_no_key_changes(plan_of):
    alone, both = plan_of(OWL, results="nothing"), plan_of(OWL, DUCK, results="nothing")
    owl, duck = row_of(both, "owl"), row_of(both, "duck")
    assert owl.base["duck"] == duck.base["duck"], "one store"
    assert alone.rows[0].base["duck"] not in both.stages, "the shorter one isn't made"
    assert keys(owl) == keys(alone.rows[0])
    assert both.path(duck.base["duck"]) in both.upstream("score_concept", owl.scores, "base")
    assert duck.base["duck"] in both.needed(owl)
    assert both.path(duck.base["duck"]) in both.files(owl)


def test_a_target_and_an_anchor_have_all_pictures_of_their_own_store(plan_of):
    plan = plan_of(OWL, BIRD, results="nothing")
    assert row_of(plan, "owl").base["bird"] != row_of(plan, "bird").base["bird"]


def test_a_job_on_another_machine_reads_the_same_store(plan_of, tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_ABLATION_PLAN", "")
    plan = plan_of(OWL, DUCK, results="nothing")
    save_snapshot(plan, {}, tmp_path)
    scores, job = row_of(plan, "owl").scores, load_snapshot()
    assert job.upstream("score_concept", scores, "base") == plan.upstream("score_concept", scores, "base")


def test_a_store_that_is_there_is_read_on_and_the_longer_one_draws_only_what_it_lacks(plan_of, monkeypatch):
    before = plan_of(OWL, results="old")
    run_stages(before)
    after = plan_of(OWL, DUCK, results="old")
    owl, duck = row_of(after, "owl"), row_of(after, "duck")
    assert owl.base == before.rows[0].base and not after.unfinished(judged=True, among=[owl])
    key = duck.base["duck"]
    assert after.start(key) == after.path(owl.base["duck"])
    drawn, spec = [], json.loads(after.spec("sample_base", key))
    real = sampling.sample_images
    monkeypatch.setattr(
        stages, "sample_images", lambda *given, **more: drawn.extend(given[2]) or real(*given, **more)
    )
    longer = Path(after.path(key))
    stages.sample_base(spec, longer, after.start(key), device="cpu")
    first = spec["probe"]["seed"]
    assert drawn == [first + number for number in range(3, 7)]
    stages.sample_base(spec, longer.with_name("whole"), device="cpu")
    stored, whole = read_store(longer), read_store(longer.with_name("whole"))
    assert stored.rows == whole.rows and stored.metadata == whole.metadata
    for one, two in zip(stored.images(), whole.images(), strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1
    assert not plan_of(OWL, DUCK, results="old").starts, "a store that is there needs no start"


def test_pictures_of_another_precision_are_no_start(plan_of):
    plan = plan_of(OWL, results="precise")
    key = plan.rows[0].base["owl"]
    spec, path = json.loads(plan.spec("sample_base", key)), Path(plan.path(key))
    other = spec | {"sampler": spec["sampler"] | {"precision": "bf16"}}
    stages.sample_base(other, path.with_name("start"), device="cpu")
    precise = spec | {"sampler": spec["sampler"] | {"precision": "fp32"}}
    stages.sample_base(precise, path, path.with_name("start"), device="cpu")
    stages.sample_base(precise, path.with_name("whole"), device="cpu")
    assert read_store(path).png(0) == read_store(path.with_name("whole")).png(0)


def test_scores_are_the_same_from_the_longer_store_and_the_record_says_which_it_is(plan_of):
    for results, rows in (("one", [OWL]), ("two", [OWL, DUCK])):
        run_stages(plan_of(*rows, results=results))
    one, two = plan_of(OWL, results="one"), plan_of(OWL, DUCK, results="two")
    owl = row_of(two, "owl")
    assert not two.unfinished(judged=True)
    assert pq.read_table(one.path(owl.scores)) == pq.read_table(two.path(owl.scores))
    lines = pq.read_table(two.image_record(owl)).to_pylist()
    lines = [line for line in lines if (line["side"], line["subject"]) == ("base", "duck")]
    assert [line["position"] for line in lines] == [0, 1, 2]
    store = read_store(Path(two.results) / "base" / f"{lines[0]['key']}.parquet")
    assert len(store) == 7 and store.column("seed")[:3] == [line["seed"] for line in lines]
    found = find_base(Path(two.results), read_store(two.path(owl.samples)))
    assert found.keys() == {"owl", "bird", "duck", "hen"} and len(found["duck"]) == 7


PROBE = {"subject": "duck", "prompts": ["a", "b"], "images": 4, "seed": 5}


@pytest.mark.parametrize(
    ("change", "does"),
    [
        ({"images": 3}, True),
        ({"images": 3, "prompts": ["a", "b", "a"]}, True),
        ({"images": 2, "prompts": ["a", "b", "c"]}, True),
        ({"images": 3, "prompts": ["a", "b", "c"]}, False),
        ({"images": 5}, False),
        ({"seed": 6}, False),
        ({"subject": "hen"}, False),
    ],
)
def test_a_store_begins_with_another_where_picture_by_picture_prompt_and_seed_are_equal(change, does):
    spec = {"model": {"path": "m"}, "sampler": {"steps": 8}, "probe": PROBE}
    assert begins(spec, spec | {"probe": PROBE | change}) is does
    assert not begins(spec, spec | {"sampler": {"steps": 9}, "probe": PROBE | change})
