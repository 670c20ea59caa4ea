"""Stable Diffusion's overlay: it plans without weights or a network, and its settings pass through every stage."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.common.settings import merge
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from tests.stages import run_plan
from tests.workflow.conftest import SMALL

pytestmark = pytest.mark.workflow
FEW = {"steps": 2}
# The overlay's own settings but for the models, the counts and the number of denoising steps.
TINY = {
    "concepts": "two.csv",
    "model": SMALL["model"],
    "prompts": {"count": 4},
    # The overlay picks the preset `paper`, which wins over the config's own sections.
    "presets": {
        "paper": {
            "anchors": {"images": 4, "sampler": FEW},
            "training": {"steps": 2, "batch_size": 2},
        }
    },
    "evaluation": {
        "images": {"target": 4, "anchor": 4, "neighbor": 2},
        "wordings": {"images": 2},
        "sampler": FEW,
        "scorer": SMALL["evaluation"]["scorer"],
        "statistics": {"bootstrap": 20},
    },
    "runtime": {"threads": 1, "device": "cpu"},
}


@pytest.fixture(scope="module")
def checkout(make_checkout):
    return make_checkout()


def test_it_plans_as_shipped_without_weights(checkout):
    table = (checkout.folder / "config" / "sd14-concepts.csv").read_text()
    rows = [line for line in table.splitlines() if line and not line.startswith("#")][1:]
    off = [line for line in rows if line.endswith(",false")]
    assert (
        len(off) == 10
    )  # memorized pictures and unsafe content, which need files, a package, or a wish to see them
    rows = [line for line in rows if line not in off]
    jobs = checkout.jobs("config/sd14.yaml")
    assert len(rows) >= 8
    assert jobs["ablate_concept"] == jobs["sample_ablated"] == jobs["score_concept"] == len(rows)
    assert jobs["generate_anchors"] < len(rows)  # rows with one anchor share its images


def test_a_run_says_once_that_the_tokenizer_is_missing(checkout):
    done = checkout.snakemake("--dry-run", "--configfile", "config/sd14.yaml", HF_HUB_CACHE="empty")
    assert done.returncode == 0 and done.stdout.count("without its tokenizer") == 1
    assert "is not in this machine's cache (empty); `hf download CompVis/stable-diffusion-v1-4" in done.stdout


def test_its_settings_take_a_style_and_an_object_through_every_stage(checkout, monkeypatch):
    """Snakemake plans the jobs; their stages run in this process, which loads torch and diffusers once."""
    table = (checkout.folder / "config" / "sd14-concepts.csv").read_text().splitlines()
    kept = [line for line in table if line.startswith(("concept,", "van-gogh,", "grumpy-cat,"))]
    checkout.write("\n".join(kept) + "\n", "two.csv")
    (checkout.folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    monkeypatch.chdir(checkout.folder)
    overlays = ("config/sd14.yaml", "tiny.yaml")
    config = read_config("config/config.yaml")
    for overlay in overlays:
        merge(config, read_config(overlay))
    plan = load_plan(config, Path("workflow/schemas"), "the overlays")[1]
    jobs = checkout.jobs(*overlays)
    assert {stage: len(specs) for stage, specs in plan.specs.items() if specs}.items() <= jobs.items()
    run_plan(plan)
    assert not checkout.jobs(*overlays).keys() - {"aggregate_scores", "render_report"}
    results = checkout.folder / "results" / "sd14"
    summary = pq.read_table(results / "report" / "summary.parquet").to_pylist()
    assert {row["concept"] for row in summary} == {"van-gogh", "grumpy-cat"}
    assert all((checkout.folder / row["delta"]).is_file() for row in summary)
    records = list(results.glob("concepts/*/training.parquet"))
    assert len(records) == 2
    for record in records:
        steps = pq.read_table(record).to_pydict()
        assert steps["learning_rate"] == [4e-6, 4e-6]  # 2e-6 x the batch of 2: the overlay's scale_lr
