"""Every family's tiny pipeline goes through every stage with the settings of its shipped overlay: from a row to the page.

Weights are random, so nothing is learned about erasing: that each stage takes each family is what this shows.
"""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.common.settings import merge
from concept_ablation.diffusion.delta import load_delta
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.report.card import card_of_results
from tests.stages import run_plan
from tests.workflow.conftest import ROOT, SMALL

pytestmark = pytest.mark.workflow
TABLE = "concept,kind,target,anchor,neighbors,bundle\nr2d2,object,r2d2,robot,bb8,both\nsnoopy,object,snoopy,robot,,both\n"
FEW = {"steps": 1, "height": 32, "width": 32}
OVERLAYS = {
    "sd2": ["sd14.yaml"],
    "sdxl": ["sd14.yaml", "sdxl.yaml"],
    "sd3": ["sd14.yaml", "sd3.yaml"],
    "flux": ["sd14.yaml", "flux.yaml"],
}
SEARCHES = ("sdxl", "sd3")  # a row's strength is searched; the others train a fixed number of steps


def settings(name: str) -> dict:
    """What makes the shipped overlay small."""
    own = {
        "concepts": "two.csv",
        "model": {"path": "model", "revision": None},
        "preset": "default",
        "prompts": {"count": 2},
        "anchors": {"images": 2, "sampler": FEW},
        "training": {"steps": 1, "batch_size": 2, "gradient_accumulation": 1, "strength": "fixed"},
        "evaluation": {
            "images": {"target": 2, "anchor": 2, "neighbor": 2},
            "sampler": FEW,
            "scorer": SMALL["evaluation"]["scorer"],
            "statistics": {"bootstrap": 10},
            "interference": "none",
            "wordings": {"images": 0},
            "attack": "soft-prompt",
            "attacks": {"images": 2, "soft-prompt": {"steps": 1, "batch_size": 1}},
        },
        "bundles": {"general": {"images": 2}, "judge": False},
        "runtime": {"device": "cpu", "threads": 1},
    }
    if name == "sd2":  # its narrow text encoder has no null space
        own["training"]["preserve"] = "none"
        own["bundles"]["how"] = "sum"
    if name in SEARCHES:
        looked = {"target": 4, "anchor": 4, "neighbor": 4}
        search = {"looks": [1], "scales": [1.0], "ladder": [{"preserve": "distill"}], "images": looked}
        own["training"] |= {"strength": "auto", "search": {**search, "batches": 2, "sampler": FEW}}
    return own


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_family_goes_through_every_stage(name, models, tmp_path, monkeypatch):
    from tests import tiny_families

    for folder in ("config", "workflow"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "models").symlink_to(models)
    getattr(tiny_families, f"make_tiny_{name}")(tmp_path / "model")
    (tmp_path / "two.csv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings(name)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = read_config("config/config.yaml")
    for overlay in [*(f"config/{file}" for file in OVERLAYS[name]), "own.yaml"]:
        merge(config, read_config(overlay))
    plan = load_plan(config, Path("workflow/schemas"), "the overlays")[1]
    run_plan(plan)

    report = Path(plan.results, "report")
    summary = pq.read_table(report / "summary.parquet").to_pylist()
    assert [line["concept"] for line in summary] == ["r2d2", "snoopy"]
    assert "r2d2" in (report / "index.html").read_text(encoding="utf-8")
    assert pq.read_table(report / "attacks.parquet").num_rows
    tensors, metadata = load_delta(summary[0]["delta"])
    layers = (
        ("to_k.weight", "to_v.weight")
        if name in ("sd2", "sdxl")
        else ("add_k_proj.weight", "add_v_proj.weight")
    )
    assert tensors and all(own.endswith(layers) for own in tensors) and metadata["group"] == "cross-attn"
    (bundle,) = plan.bundles
    assert set(load_delta(plan.path(bundle.delta))[0]) == set(tensors)

    card = card_of_results(plan.results, "r2d2", tmp_path / "card")
    kinds = {"sd2": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
    text = (card / "README.md").read_text(encoding="utf-8")
    assert f"import {kinds[name]}Pipeline" in text
    assert ("- flux" if name == "flux" else "- stable-diffusion") in text
