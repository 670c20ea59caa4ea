"""Another workflow uses this one as a module, with a config, a table and a results folder of its own."""

import contextlib
import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.common.settings import merge
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.registries import STAGES
from tests.stages import run_stages
from tests.workflow.conftest import HEADER, ROOT, SMALL, Checkout

pytestmark = pytest.mark.workflow
SNAKEFILE = """
configfile: "studies.yaml"


module ablation:
    snakefile:
        "modules/concept-ablation/Snakefile"
    config:
        config["ablation"]


use rule * from ablation as ablation_*


rule all:
    default_target: True
    input:
        rules.ablation_all.input,
        "published.csv",


rule publish:
    input:
        "out/cats/report/summary.csv",
    output:
        "published.csv",
    shell:
        "cp {input} {output}"


onsuccess:
    print("OUR OWN END")
    ablation.onsuccess()
"""
# What the module is told; all else is its own config's. Prompt files are the user's, relative to the working directory.
OWN = {
    **{key: SMALL[key] for key in ("model", "anchors", "training", "evaluation", "runtime")},
    "concepts": "tables/cats.csv",
    "results": "out/cats",
    "prompts": {"count": 4, "training": "prompts/training.txt", "evaluation": "prompts/evaluation.txt"},
}
CAT = "cat,object,pouting cat,cat,,\n"
ARGUMENTS = ("--cores", "2", "--rerun-triggers", "mtime", "params")


@pytest.fixture(scope="module")
def other(models, tmp_path_factory) -> Checkout:
    """Another workflow's checkout, which holds this one below `modules/`."""
    folder = tmp_path_factory.mktemp("other")
    module = folder / "modules" / "concept-ablation"
    module.mkdir(parents=True)
    shutil.copy(ROOT / "Snakefile", module)
    for name in ("workflow", "config"):
        shutil.copytree(ROOT / name, module / name)
    (module / "concept_ablation").symlink_to(ROOT / "concept_ablation")
    (folder / "models").symlink_to(models)
    for name, prompt in (
        ("training", "a {subject} on a {colour} mat"),
        ("evaluation", "a photo of a {subject}"),
    ):
        (folder / "prompts").mkdir(exist_ok=True)
        (folder / "prompts" / f"{name}.txt").write_text(prompt + "\n", encoding="utf-8")
    (folder / "tables").mkdir()
    (folder / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    checkout = Checkout(folder)
    checkout.write(HEADER + CAT, "tables/cats.csv")
    write_config(checkout)
    with contextlib.chdir(folder):  # the base model's pictures, in this process: a job takes seconds to start
        config = read_config(module / "config" / "config.yaml")
        merge(config, OWN)
        plan = load_plan(config, module / "workflow" / "schemas", "the module's config")[1]
        run_stages(plan, but=STAGES.keys() - {"sample_base"}, batch_size=4)
    return checkout


def write_config(checkout: Checkout, **changes) -> None:
    text = yaml.safe_dump({"ablation": {**OWN, **changes}})
    (checkout.folder / "studies.yaml").write_text(text, encoding="utf-8")


def test_it_runs_and_its_results_go_on_in_the_other_workflow(other):
    done = other.snakemake(*ARGUMENTS)
    assert done.returncode == 0, done.stdout
    assert "pouting cat" in (other.folder / "published.csv").read_text()
    results = other.folder / "out" / "cats"
    (row,) = pq.read_table(results / "report" / "summary.parquet").to_pylist()
    assert row["concept"] == "cat" and (other.folder / row["delta"]).is_file()
    assert list((results / "logs" / "ablate_concept").glob("*.log"))
    assert not (other.folder / "results").exists()
    # Its end is the other workflow's own, which may call the module's.
    assert "OUR OWN END" in done.stdout and "out/cats/report/index.html" in done.stdout
    again = other.snakemake(*ARGUMENTS)
    assert "Nothing to be done" in again.stdout, again.stdout


def test_a_new_row_costs_itself(other):
    other.write(HEADER + CAT + "dog,object,grinning cat,cat,,\n", "tables/cats.csv")
    plan = other.snakemake("--dry-run", *ARGUMENTS).stdout
    other.write(HEADER + CAT, "tables/cats.csv")
    jobs = dict(re.findall(r"^ablation_(\w+) +(\d+)$", plan, re.MULTILINE))
    assert jobs["ablate_concept"] == jobs["sample_ablated"] == jobs["sample_base"] == "1"
    assert not jobs.keys() & {"write_prompts", "generate_anchors"}


def test_a_mistake_in_its_config_is_told_as_ever(other):
    write_config(other, trainig={"steps": 2})
    done = other.snakemake("--dry-run", *ARGUMENTS)
    write_config(other)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert "config of the module: 1 error" in done.stdout
    assert "trainig: unknown key (did you mean 'training'?)" in done.stdout
