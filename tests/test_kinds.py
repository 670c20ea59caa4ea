"""Every kind of row, group, loss and preset goes through every stage; the tiny models' scores mean nothing here."""

import copy
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.plan.settings import merge
from concept_ablation.plan.specs import load_plan
from tests.stages import run_plan
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip
from tests.workflow.conftest import SMALL

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "workflow" / "schemas"
TABLE = """concept,kind,target,anchor,neighbors,preset,parameter_group,training.loss,anchors.images,anchors.sampler.steps,steps,training.batch_size,training.prior_preservation,training.strength
two-styles,style,ink; pencil,picture,neon,,,,4,2,2,2,,
paper,style,ink,picture,neon,paper,,,4,2,2,2,yes,
diffusers,style,pencil,picture,neon,diffusers,,,4,2,2,2,yes,
unsafe,inappropriate,angry,face,robot; ghost,,attn,,4,2,2,2,,
all-weights,object,pouting cat,cat,weary cat,,full-weight,noise-based,4,2,2,2,,
tokens,object,pouting cat,cat,weary cat,,embedding,,4,2,2,2,,
searched,inappropriate,angry,face,robot; ghost,,attn,,4,2,2,2,,auto
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models, in which TABLE was run."""
    folder = tmp_path_factory.mktemp("kinds")
    make_tiny_pipeline(folder / "models" / "pipeline", size=32)
    make_tiny_clip(folder / "models" / "clip")
    (folder / "config").symlink_to(ROOT / "config")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_plan(plan_of(TABLE))
    return folder


def plan_of(table: str, results: str = "results"):
    """The plan of `table` in the working directory."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    merge(config, copy.deepcopy(SMALL))
    config["evaluation"]["interference"] = "near"
    Path("rows.csv").write_text(table)
    config |= {"concepts": "rows.csv", "results": results}
    return load_plan(config, SCHEMAS, "config")[1]


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def summary_of(results: str) -> dict[str, dict]:
    lines = pq.read_table(f"{results}/report/summary.parquet").to_pylist()
    return {line["concept"]: line for line in lines}


def test_every_row_is_in_the_report():
    names = {line.split(",")[0] for line in TABLE.splitlines()[1:]}
    assert summary_of("results").keys() == names
    page = Path("results/report/index.html").read_text()
    assert all(name in page for name in names)


def test_each_of_two_targets_is_scored_alone_and_together():
    scores = pq.read_table("results/report/scores.parquet").to_pylist()
    found = {(line["role"], line["probe"]) for line in scores if line["concept"] == "two-styles"}
    assert {("target", "ink"), ("target", "pencil")} <= found and "targets" in {role for role, _ in found}


def test_an_unsafe_row_is_judged_by_its_detector_and_its_anchors_are_drawn_without_it():
    summary = summary_of("results")
    assert summary["unsafe"]["measure"] == "detected" and summary["paper"]["measure"] == "clip_accuracy"
    (store,) = Path("results/anchors").glob("inappropriate-face.*.parquet")
    assert b'"negative_prompt": "angry"' in pq.read_metadata(store).metadata[b"concept_ablation"]


def test_a_presets_settings_are_in_the_delta_and_a_column_replaces_them():
    from concept_ablation.diffusion.delta import load_delta

    summary = summary_of("results")
    for name, wanted in (
        (
            "paper",
            {
                "scale_lr": "compvis",
                "prior_form": "halved",
                "prior_weight": 0.2,
                "max_grad_norm": None,
                "steps": 2,
            },
        ),
        (
            "diffusers",
            {"scale_lr": "diffusers", "prior_form": "doubled", "mask_border": True, "batch_size": 2},
        ),
        ("two-styles", {"scale_lr": "none", "prior_preservation": False}),
    ):
        _, metadata = load_delta(summary[name]["delta"])
        assert metadata["settings"].items() >= wanted.items(), name


def test_a_searched_strength_is_in_the_tables_and_on_the_page():
    summary = summary_of("results")
    assert summary["unsafe"]["strength_looks"] is None and summary["unsafe"]["strength_found"] is None
    line = summary["searched"]
    (plan,) = (spec for spec in plan_of(TABLE).specs["ablate_concept"].values() if "search" in spec)
    looks = pq.read_table(Path(line["delta"]).with_name("strength.parquet")).to_pylist()
    assert line["strength_looks"] == len(looks) >= 1
    assert line["validation_pictures"] == sum(look["pictures"] for look in looks) >= 4 * len(looks)
    (chosen,) = (look for look in looks if look["chosen"])
    assert (line["strength_step"], line["strength_scale"]) == (chosen["step"], chosen["scale"])
    assert json.loads(line["strength_settings"]) in plan["search"]["ladder"]
    assert Path("results/report/index.html").read_text().count("<h3>Strength</h3>") == 1


def test_the_groups_change_what_they_say_and_nothing_else():
    from concept_ablation.diffusion.delta import load_delta

    summary = summary_of("results")
    names = {name: set(load_delta(line["delta"])[0]) for name, line in summary.items()}
    assert {".attn2.to_k." in name or ".attn2.to_v." in name for name in names["two-styles"]} == {True}
    assert {".attn1." in name for name in names["unsafe"]} == {True, False}
    assert any("conv" in name for name in names["all-weights"])
    assert {name.startswith("text_encoder.") for name in names["tokens"]} == {True}


def test_every_model_is_measured_on_other_rows_subjects_with_their_own_prompts_and_seeds():
    from concept_ablation.common.image_store import read_store

    plan, drawn, probed = plan_of(TABLE), 0, 0
    for row in plan.rows:
        files = plan.interference_files(row)
        lines = pq.read_table(files["scores"]).to_pylist()
        own = {
            line["probe"]: line["value"]
            for line in pq.read_table(plan.path(row.scores)).to_pylist()
            if (line["role"], line["metric"], line["side"]) == ("neighbor", "typical", "ablated")
        }
        for place, (victim, line) in enumerate(zip(row.interference.victims, lines, strict=True)):
            assert line["victim"] == victim.subject not in row.concept.targets
            if victim.probed and victim.probed[0] == "neighbor":
                assert line["typical_ablated"] == own[victim.probed[1]]
                probed += 1
            elif not victim.probed:
                store, base = (
                    read_store(files["images"]).select(f"victim {place}"),
                    read_store(plan.path(victim.base)),
                )
                assert len(store) == line["n"] <= len(base)
                for column in ("prompt", "seed"):
                    assert store.column(column) == base.column(column)[: len(store)]
                drawn += 1
    assert drawn and probed
    assert summary_of("results")["paper"]["victims_measured"] == len(
        next(row for row in plan.rows if row.concept.name == "paper").interference.victims
    )


def test_a_delta_of_the_published_form_is_judged_as_a_row():
    from concept_ablation.diffusion.delta_export import export_delta

    before = summary_of("results")["paper"]
    export_delta(before["delta"], "their.bin", "delta-bin")
    table = "concept,kind,target,anchor,neighbors,delta\ntheirs,style,ink,picture,neon,their.bin\n"
    plan = plan_of(table, "theirs")
    assert not plan.specs["ablate_concept"]
    run_plan(plan)
    after = summary_of("theirs")["theirs"]
    for column in ("target_accuracy_ablated", "target_kid_x1000", "neighbor_recognition_ablated"):
        assert after[column] == pytest.approx(before[column]), "the same weights, the same pictures"
