"""Pictures as many as needed: intervals that hold at all looks, when a lane is enough, what is drawn, scored and planned then."""

import contextlib
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import beta, binom, norm

from concept_ablation.common.decision import Decision
from concept_ablation.common.exact import clopper_pearson
from concept_ablation.common.image_store import read_store
from concept_ablation.common.roles import planned_looks, probe_roles
from concept_ablation.evaluation.looks import open_lanes, sample_ablated
from concept_ablation.evaluation.statistics import (
    Bootstrap,
    paired_proportion_difference,
    proportion,
    share_difference,
)
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.schema import check_config, load_schema
from concept_ablation.plan.specs import build_plan
from concept_ablation.registries import METRICS
from concept_ablation.report.tables import read_scores
from concept_ablation.verdict import Parts, changes_of, parts_of, presence_of, read_thresholds
from tests.stages import run_plan, run_stages
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip
from tests.workflow.conftest import SMALL

ROOT = Path(__file__).parents[1]
OWL = Concept("owl", "object", ("owl",), "bird", ("duck", "penguin"))
INK = Concept("ink", "style", ("ink",), "picture", ("neon",))
LOOK, MOST = 4, {"target": 10, "anchor": 8, "neighbor": 12, "paraphrase": 4, "victim": 4}


# Intervals


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.995])
def test_the_exact_interval_is_clopper_and_pearsons(confidence):
    tail = (1 - confidence) / 2
    for n in (1, 7, 16, 160):
        for count in {0, 1, n // 3, n - 1, n}:
            low = 0 if count == 0 else beta.ppf(tail, count, n - count + 1)
            high = 1 if count == n else beta.ppf(1 - tail, count + 1, n - count)
            assert clopper_pearson(count, n, confidence) == pytest.approx((low, high), abs=1e-9)
    assert clopper_pearson(2.5, 9) == (clopper_pearson(2, 9)[0], clopper_pearson(3, 9)[1]), "a tie: outwards"


def test_exact_intervals_hold_at_all_looks_at_once():
    """By Bonferroni's inequality: the chance to miss, summed over ten looks, from the binomial distribution."""
    level, shares = Bootstrap(looks=10).level, np.array([0.02, 0.1, 0.5, 0.9])
    missed = np.zeros(len(shares))
    for n in range(16, 161, 16):
        low, high = np.array([clopper_pearson(count, n, level) for count in range(n + 1)]).T[:, :, None]
        missed += (binom.pmf(np.arange(n + 1)[:, None], n, shares) * ((shares < low) | (shares > high))).sum(
            0
        )
    assert np.all(missed <= 0.05) and np.all(missed > 0.001)


def test_a_level_is_shared_among_the_looks_and_a_single_look_has_it_whole():
    assert Bootstrap(0.95, looks=1).level == pytest.approx(0.95)
    spent = replace(Bootstrap(0.9, draws=200), looks=5)
    assert spent.level == pytest.approx(0.98)
    assert spent.options == {"confidence": spent.level, "draws": 1000, "seed": 0, "joint": False}


def test_metrics_have_the_intervals_of_their_looks():
    before, after = np.repeat([1.0, 0.0], [9, 3]), np.repeat([1.0, 0.0], [2, 10])
    (place,) = [place for place in [METRICS["recognition"]] if place.interval == "share"]
    from concept_ablation.evaluation.metrics.base import Values

    made = place.estimates([Values(before, after)], Bootstrap(0.95, looks=4))
    level = 1 - 0.05 / 4
    assert made["ablated"] == proportion(after, confidence=level, exact=True)
    assert made["ablated"].interval == "clopper-pearson"
    assert made["difference"] == paired_proportion_difference(after, before, confidence=level)
    z = norm.ppf(1 - 0.05 / 8)
    assert made["difference"].high - made["difference"].low == pytest.approx(
        2 * z * np.sqrt(((7 + 2) / 14 - (7 / 14) ** 2) / 14)
    )
    one, other = (clopper_pearson(count, 12, level) for count in (2, 9))
    above = share_difference(after, before, confidence=level, exact=True)
    assert above.high - above.value == pytest.approx(np.hypot(one[1] - 2 / 12, 9 / 12 - other[0]))


# When a lane is enough


def value(share, half, limit=0.2):
    return Decision.of(share, share - half, share + half, limit, "at most")


GONE, OPEN, THERE = value(0.05, 0.1), value(0.15, 0.1), value(0.8, 0.1)
LOST_NONE, LOST_FEW = value(-0.01, 0.04, 0.05), value(0.04, 0.04, 0.05)


@pytest.mark.parametrize(
    ("parts", "half_width", "decided", "unclear"),
    [
        (Parts((GONE,), LOST_NONE, LOST_NONE, GONE), None, True, set()),
        (Parts((OPEN,), LOST_NONE, LOST_NONE, GONE), None, True, {"target"}),
        (Parts((GONE,), LOST_NONE, LOST_NONE, OPEN), None, True, {"target"}),
        (Parts((GONE,), LOST_FEW, LOST_NONE, GONE), None, True, {"neighbor"}),
        (Parts((GONE,), LOST_FEW, LOST_NONE, GONE), 0.05, True, set()),
        (Parts((GONE,), LOST_NONE, OPEN, GONE), 0.05, True, {"neighbor"}),
        (Parts((GONE,), LOST_NONE, None, GONE), 0.05, False, {"target"}),
        (Parts((GONE,), None, None, None), 0.1, False, set()),
        (Parts((OPEN, THERE), LOST_FEW, OPEN, OPEN), None, True, set()),
        (Parts((OPEN, THERE), LOST_FEW, OPEN, OPEN), 0.05, False, {"target", "neighbor"}),
    ],
)
def test_a_lane_goes_on_while_something_that_it_decides_is_unclear(parts, half_width, decided, unclear):
    assert open_lanes(parts, half_width, decided) == unclear


def test_probes_that_are_compared_or_pooled_have_as_many_looks():
    probes = [
        {"role": "target", "images": 40},
        {"role": "anchor", "images": 24},
        {"role": "neighbor", "images": 17},
    ]
    assert planned_looks(probes, 16) == {"target": 3, "anchor": 3, "neighbor": 2}


# What is drawn and scored


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models, in which plans of the shipped config are run."""
    folder = tmp_path_factory.mktemp("looks")
    (folder / "config").symlink_to(ROOT / "config")
    make_tiny_pipeline(folder / "models" / "pipeline", size=32)
    make_tiny_clip(folder / "models" / "clip")
    return folder


def small(**until):
    """The shipped config with few pictures of tiny models."""
    from concept_ablation.common.settings import merge

    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    merge(config, copy.deepcopy(SMALL))
    merge(config, {"evaluation": {"images": MOST, "until": {"look": LOOK, **until}}})
    return config


@pytest.fixture(scope="module")
def run(folder):
    """`run(batch_size=4, **until)` gives the plan of OWL after its run, its samples and its scores."""

    def made(batch_size=4, results="results", concepts=(OWL,), **until):
        with contextlib.chdir(folder):
            plan = build_plan(list(concepts), small(**until) | {"results": str(folder / results)})
            run_stages(plan, batch_size=batch_size)
            row = plan.rows[0]
            return plan, read_store(plan.path(row.samples)), read_scores(plan.path(row.scores)).to_pylist()

    return made


def counts(samples):
    return {role: len(samples.select(role=role)) for role in ("target", "anchor", "neighbor")}


def test_narrow_enough_intervals_end_it_after_the_first_look(run):
    _, samples, lines = run(half_width=0.999)
    assert counts(samples) == {"target": 4, "anchor": 4, "neighbor": 8}
    assert {(line["n"], line["looks"], line["looks_most"]) for line in lines if not line["pooled"]} == {
        (4, 1, 3)
    }
    assert {
        line["interval"] for line in lines if line["metric"] == "recognition" and line["side"] == "base"
    } == {"clopper-pearson"}


def test_it_never_goes_beyond_the_most(run):
    _, samples, lines = run(half_width=0.001)
    assert counts(samples) == {"target": 10, "anchor": 8, "neighbor": 24}
    taken = {line["role"]: (line["looks"], line["looks_most"]) for line in lines}
    assert taken["target"] == taken["neighbor"] == (3, 3) and taken["anchor"] == (2, 3)


def test_pictures_are_the_first_of_a_fixed_number_whatever_the_batch_size(run):
    _, fixed, lines = run()
    assert {(line["looks"], line["looks_most"]) for line in lines} == {(None, None)}
    for batch_size, results in ((4, "results"), (1, "ones")):
        _, samples, _ = run(batch_size, results, half_width=0.4)
        assert len(samples) < len(fixed)
        for role, subject in probe_roles(vars(OWL)):
            own = samples.select(role, subject)
            other = fixed.select(role, subject).first(len(own))
            assert own.rows == other.rows
            for one, two in zip(own.images(), other.images(), strict=True):
                assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_it_ends_when_the_report_itself_finds_the_lanes_clear_or_the_most_is_reached(run):
    plan, samples, lines = run(half_width=0.35, decided=True)
    spec = plan.specs["sample_ablated"][plan.rows[0].samples]
    thresholds = read_thresholds({"verdict": plan.report["verdict"]})
    parts = parts_of("object", presence_of(spec, lines), changes_of(lines), thresholds)
    unclear = open_lanes(parts, 0.35, True)
    for lane, most in (("target", MOST["target"]), ("neighbor", 2 * MOST["neighbor"])):
        assert lane not in unclear or counts(samples)[lane] == most


def test_the_record_of_pictures_says_where_each_one_is(run):
    plan, samples, lines = run(half_width=0.001)
    rows = pq.read_table(plan.image_record(plan.rows[0])).to_pylist()
    for line in (line for line in rows if line["side"] == "ablated"):
        there = samples.rows[line["position"]]
        assert (there["role"], there["subject"], there["seed"]) == (
            line["role"],
            line["subject"],
            line["seed"],
        )
    assert len(rows) == 2 * len(samples), "of the base model's pictures those that are compared"
    for line in lines:
        if line["metric"] == "clip_accuracy" and not line["pooled"] and line["side"] != "difference":
            own = [
                r["clip_accuracy"]
                for r in rows
                if (r["side"], r["role"], r["subject"]) == (line["side"], line["role"], line["probe"])
            ]
            assert line["value"] == pytest.approx(np.mean(own)) and line["n"] == len(own)


def test_a_job_that_dies_leaves_nothing_and_the_next_makes_the_same(run, tmp_path, monkeypatch):
    plan, samples, _ = run(half_width=0.001)
    row = plan.rows[0]
    spec = json.loads(plan.spec("sample_ablated", row.samples))
    files = plan.path(row.ablation), tmp_path / "s.parquet"
    base = plan.upstream("sample_ablated", row.samples, "base")
    monkeypatch.chdir(Path(plan.results).parent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        looks = iter([{"target", "neighbor"}])
        patch.setattr("concept_ablation.evaluation.looks.open_lanes", lambda *_: next(looks, None) or stop())
        sample_ablated(spec, *files, base, device="cpu", batch_size=4)
    assert not list(tmp_path.iterdir())
    sample_ablated(spec, *files, base, device="cpu", batch_size=4)
    assert read_store(tmp_path / "s.parquet").table.equals(samples.table)


def stop():
    raise KeyboardInterrupt


def test_a_report_of_unequal_counts_is_made_of_styles_bundles_and_victims(folder):
    with contextlib.chdir(folder):
        config = small(half_width=0.3, decided=True) | {"results": str(folder / "whole")}
        config["evaluation"]["interference"] = "all"
        config["bundles"] |= {"all": "both", "how": "sum"}
        plan = build_plan([OWL, INK], config)
        run_plan(plan, batch_size=8)
    report = folder / "whole" / "report"
    summary = {line["concept"]: line for line in pq.read_table(report / "summary.parquet").to_pylist()}
    scores = pq.read_table(report / "scores.parquet").to_pylist()
    for name, line in summary.items():
        (found,) = {one["n"] for one in scores if one["concept"] == name and one["role"] == "anchor"}
        assert line["anchor_images"] == found <= MOST["anchor"]
    bundles = pq.read_table(report / "bundles.parquet").to_pylist()
    assert {line["concept"] for line in bundles} == {"owl", "ink"}
    assert {line["n"] for line in pq.read_table(report / "interference.parquet").to_pylist()} == {LOOK}
    assert (report / "index.html").stat().st_size


# The plan


def specs(plan, stage):
    return {
        row.concept.name: plan.specs[stage][getattr(row, name)]
        for row in plan.rows
        for name in [PLACE[stage]]
    }


PLACE = {"sample_ablated": "samples", "score_concept": "scores"}


def test_base_pictures_have_the_same_keys_whether_looks_are_taken_or_not(folder, monkeypatch):
    monkeypatch.chdir(folder)
    off, on = (build_plan([OWL, INK], small(decided=decided)) for decided in (False, True))
    assert off.specs["sample_base"].keys() == on.specs["sample_base"].keys()
    assert off.specs["ablate_concept"].keys() == on.specs["ablate_concept"].keys()
    for row in off.rows:
        assert "until" not in off.specs["sample_ablated"][row.samples]
        assert off.upstream("sample_ablated", row.samples, "base") == []
    for row in on.rows:
        assert on.upstream("sample_ablated", row.samples, "base") == [
            on.path(key) for key in row.base.values()
        ]
        assert set(row.base.values()) <= set(on.needed(row.samples))


def test_equal_numbers_make_one_base_store_of_a_target_and_a_neighbor(folder, monkeypatch):
    monkeypatch.chdir(folder)
    duck = Concept("duck", "object", ("duck",), "bird", ("owl", "penguin"))
    config = small(decided=True)
    config["evaluation"]["images"] = dict.fromkeys(MOST, 12)
    one, other = build_plan([OWL, duck], config).rows
    assert set(one.base.values()) == set(other.base.values())


def test_the_verdicts_limits_name_pictures_only_if_they_decide_their_number(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def keys(kind, limit, **until):
        config = small(**until)
        config["verdict"][limit] = 0.33
        return {row.samples for row in build_plan([OWL if kind == "object" else INK], config).rows}

    for until in ({"half_width": 0.1}, {}):
        assert keys("object", "target_max", **until) == keys("object", "base_min", **until)
    assert keys("object", "target_max", decided=True) != keys("object", "base_min", decided=True)
    assert keys("style", "target_max", decided=True) == keys("style", "base_min", decided=True)


@pytest.mark.parametrize(
    "wrong", [{"half_width": 0}, {"half_width": 1.5}, {"look": 1}, {"decided": "maybe"}, {"cap": 9}]
)
def test_a_wrong_setting_is_told(wrong):
    schema, config = load_schema(ROOT / "workflow/schemas/config.schema.yaml"), small(**wrong)
    with pytest.raises(Exception, match=f"evaluation.until.{next(iter(wrong))}"):
        check_config(config, schema, "config.yaml")


def test_stable_diffusions_config_takes_looks():
    overlay = yaml.safe_load((ROOT / "config" / "sd14.yaml").read_text(encoding="utf-8"))
    assert overlay["evaluation"]["until"] == {"half_width": 0.05, "decided": True}
