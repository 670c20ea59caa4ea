"""Methods of one change: what its size is by default, and the search for it. The pictures that judge it are replaced by a rule."""

import json

import pyarrow.parquet as pq
import pytest
import test_plan
import torch
from test_bundles import CAT
from test_strength import finding
from tiny import make_tiny_pipeline

from concept_ablation import load_delta, load_pipeline
from concept_ablation.evaluation import validation
from concept_ablation.methods.stage import ablate_concept
from concept_ablation.methods.uce import METHOD
from concept_ablation.plan.schema import check_config
from concept_ablation.plan.specs import build_plan

config = test_plan.config
METHODS = ("esd", "uce", "rece", "speed")


def spec_of(config, method, **settings):
    config["method"] = {"name": method, method: settings}
    check_config(config, test_plan.CONFIG_SCHEMA, "x")
    (spec,) = build_plan([CAT], config).specs["ablate_concept"].values()
    return spec


@pytest.mark.parametrize("method", METHODS)
def test_as_published_no_picture_names_the_work_and_a_default_neither(config, method):
    plain = spec_of(config, method)
    assert plain["settings"] == {} and not {"validation", "search", "anchors"} & set(plain)
    assert spec_of(config, method, strength="fixed") == plain
    config["training"]["search"]["scales"] = [1.0]
    assert spec_of(config, method) == plain, "what a search would try is no matter without one"


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_named_by_its_scales_and_by_what_it_looks_at(config, method):
    found = spec_of(config, method, strength="auto")
    assert found["settings"] == {"strength": "auto"}
    assert found["search"] == {"scales": config["training"]["search"]["scales"]}
    assert found["validation"]["probes"] and found["neighbors"] == ["weary cat", "crying cat"]


class Judge:
    """Finds the target gone from a change of size `enough` on; sees the size in the weights."""

    enough = 2.0

    def __init__(self, spec, pipeline):
        self.pipeline, self.name = pipeline, next(n for n, _ in pipeline.unet.named_parameters() if "attn2.to_k" in n)  # fmt: skip
        self.full, _ = METHOD.edit({**spec, "settings": {}}, Judge.fresh)
        self.base = Judge.fresh.unet.get_parameter(self.name).detach()

    def look(self, spending):
        now = self.pipeline.unet.get_parameter(self.name).detach() - self.base
        whole = self.full[f"unet.{self.name}"] - self.base
        size = float((now * whole).sum() / whole.square().sum())
        return finding(0.0 if size > self.enough - 1e-3 else 0.9, 0.0)


def search(tmp_path, monkeypatch, enough):
    folder = make_tiny_pipeline(tmp_path / "model")
    Judge.fresh, Judge.enough = load_pipeline(folder, device="cpu"), enough
    monkeypatch.setattr(validation, "Validation", Judge)
    row = {"kind": "object", "targets": ["owl"], "anchor": "bird", "neighbors": ["duck"], "templates": []}
    spec = {"stage": "ablate_concept", "method": "uce", **row, "settings": {"strength": "auto"}}
    spec |= {"search": {"scales": [1.0, 1.5, 2.0, 4.0]}, "validation": {"alpha": 0.05}}
    spec["model"] = {"path": str(folder), "revision": None}
    files = {name: tmp_path / f"{name}.parquet" for name in ("training", "strength")}
    ablate_concept(spec, tmp_path / "d.safetensors", **files, device="cpu")
    values, metadata = load_delta(tmp_path / "d.safetensors")
    return values, metadata, pq.read_table(files["strength"]).to_pylist(), spec


def test_the_smallest_scale_that_serves_is_taken(tmp_path, monkeypatch):
    values, metadata, looks, spec = search(tmp_path, monkeypatch, enough=2.0)
    assert [look["scale"] for look in looks] == [1.0, 1.5, 2.0] and looks[-1]["chosen"]
    assert metadata["strength"]["scale"] == 2.0 and metadata["strength"]["reached"]
    whole, _ = METHOD.edit({**spec, "settings": {}}, Judge.fresh)
    for name, value in values.items():
        base = Judge.fresh.unet.get_parameter(name.removeprefix("unet.")).detach()
        torch.testing.assert_close(value, base + 2 * (whole[name] - base), atol=1e-5, rtol=0)


def test_what_is_enough_as_published_stays_as_it_is(tmp_path, monkeypatch):
    values, metadata, looks, spec = search(tmp_path, monkeypatch, enough=0.5)
    assert len(looks) == 1 and json.loads(looks[0]["settings"]) == {}
    whole, _ = METHOD.edit({**spec, "settings": {}}, Judge.fresh)
    assert all(torch.equal(values[name], whole[name]) for name in whole)
    assert metadata["strength"]["scale"] == 1.0
