"""`how: uce`: its closed form against the published formula written out, what it preserves, what names its work."""

import json

import numpy as np
import pytest
import test_plan
import torch
from test_bundles import BOTH
from tiny import make_tiny_pipeline

from concept_ablation import load_delta, load_pipeline
from concept_ablation.methods.bundles.stage import merge_deltas
from concept_ablation.methods.bundles.uce import preserved
from concept_ablation.methods.concept_editing import Subjects, projections
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.schema import check_config
from concept_ablation.plan.specs import build_plan

config = test_plan.config
ROWS = [
    {"kind": "object", "targets": ["owl"], "anchor": "bird", "neighbors": ["duck"]},
    {"kind": "object", "targets": ["fox"], "anchor": "animal", "neighbors": ["owl", "dog"]},
]
ROWS = [{**row, "prompts": "p.1", "templates": [], "most_prompts": None} for row in ROWS]


def test_what_any_row_removes_is_not_preserved():
    words, prompts = preserved(ROWS, ["a house", "two owls", "a house", "a fox on a hill"])
    assert words == ["bird", "duck", "animal", "dog"] and prompts == ["a house"]


def test_the_model_is_the_published_formula_over_all_rows(tmp_path):
    folder = make_tiny_pipeline(tmp_path / "model")
    file = tmp_path / "p.1.json"
    file.write_text(json.dumps({"prompts": ["a bird"]}))
    spec = {"stage": "merge_deltas", "bundle": "both", "how": "uce", "scale": 1.0, "concepts": ROWS}
    spec |= {"model": {"path": str(folder), "revision": None}, "prompts": ["p.1"], "general": ["a house"]}
    spec["settings"] = {"ridge": 0.3}
    merge_deltas(spec, tmp_path / "d.safetensors", prompts=[file], device="cpu")
    values, metadata = load_delta(tmp_path / "d.safetensors")
    assert metadata["targets"] == ["owl", "fox"] and metadata["settings"]["how"] == "uce"
    pipeline = load_pipeline(folder, device="cpu")
    last = Subjects(pipeline, "{}", "last")
    token = {
        word: last.of(word)[0].detach().double().numpy()
        for word in ("owl", "bird", "fox", "animal", "duck", "dog", "a house")
    }
    for name, weight in projections(pipeline).items():
        old = weight.double().numpy()
        first, second = 0.3 * old, 0.3 * np.eye(old.shape[1])
        for c, star in (("owl", "bird"), ("fox", "animal")):
            first = first + np.outer(old @ token[star], token[c])
            second = second + np.outer(token[c], token[c])
        for word in ("bird", "duck", "animal", "dog", "a house"):
            first = first + np.outer(old @ token[word], token[word])
            second = second + np.outer(token[word], token[word])
        found = values[name].double()
        torch.testing.assert_close(found, torch.from_numpy(first @ np.linalg.inv(second)), atol=1e-5, rtol=0)
    assert set(values) == set(projections(pipeline))


def test_its_work_is_named_by_words_and_settings_not_by_deltas(config):
    config["bundles"] |= {"how": "uce", "uce": {"ridge": 0.5}}
    check_config(config, test_plan.CONFIG_SCHEMA, "x")
    plan = build_plan(BOTH, config)
    (spec,) = plan.specs["merge_deltas"].values()
    assert "deltas" not in spec and spec["settings"] == {}, "a default names nothing"
    config["training"]["learning_rate"] = 5e-4
    again = build_plan(BOTH, config)
    assert plan.specs["merge_deltas"] == again.specs["merge_deltas"]
    config["bundles"]["uce"] = {"ridge": 0.1}
    assert plan.specs["merge_deltas"] != build_plan(BOTH, config).specs["merge_deltas"]


def test_a_row_without_weights_may_be_in_it_but_not_among_merged_deltas(config):
    from dataclasses import replace

    rows = [replace(BOTH[0], overrides={"method.name": "negative-prompt"}), BOTH[1]]
    config["bundles"]["how"] = "uce"
    assert build_plan(rows, config).bundles
    config["bundles"]["how"] = "sum"
    with pytest.raises(PlanError, match="changes no weights"):
        build_plan(rows, config)
