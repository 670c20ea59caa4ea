"""What brings a target back, in Snakemake: which jobs there are, what the report gets, and that nothing else is done again."""

import copy

import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.diffusion.delta import read_metadata
from tests.workflow.conftest import HEADER, SMALL

pytestmark = pytest.mark.workflow
ROWS = HEADER.replace("steps", "steps,synonyms") + "cat,object,pouting cat,cat,weary cat,,sulking cat\n"
REPORT = {"aggregate_attacks": 1, "aggregate_scores": 1, "render_report": 1}


@pytest.fixture(scope="module")
def attacked(make_checkout):
    """A checkout with the report of a row that is asked for in other words and attacked."""
    checkout, own = make_checkout(), copy.deepcopy(SMALL)
    budget = {"tokens": 2, "steps": 2, "batch_size": 2}
    own["evaluation"]["wordings"] = {"images": 2}
    own["evaluation"] |= {"attack": "soft-prompt", "attacks": {"images": 2, "soft-prompt": budget}}
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    checkout.write(ROWS)
    checkout.prepare(ROWS, but=("probe_wordings", "attack_concept"))
    assert checkout.jobs("small.yaml") == {"probe_wordings": 1, "attack_concept": 1, **REPORT}
    done = checkout.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    assert "back when asked for in another way" in done.stdout, "the terminal says how it came out"
    return checkout


def test_the_report_has_every_family_and_the_attack(attacked):
    report = attacked.folder / "results" / "report"
    lines = pq.read_table(report / "attacks.parquet").to_pylist()
    families = ["paraphrase", "synonym", "typo", "longer", "beside", "soft-prompt"]
    assert [line["family"] for line in lines] == families
    assert {line["n"] for line in lines} == {2} and lines[-1]["control"] is not None
    (summary,) = pq.read_table(report / "summary.parquet").to_pylist()
    assert summary["attack_worst"] in families and summary["attack_images"] == 12
    assert "Asked for in another way" in (report / "index.html").read_text(encoding="utf-8")
    assert attacked.jobs("small.yaml") == {}


def test_a_lost_table_is_made_again_and_nothing_else(attacked):
    (table,) = (
        file for file in (attacked.folder / "results/wordings").glob("cat.*") if "images" not in file.name
    )
    content = table.read_bytes()
    table.unlink()
    jobs = attacked.jobs("small.yaml")
    table.write_bytes(content)
    assert jobs == {"probe_wordings": 1, **REPORT}


def test_a_row_is_hardened_by_a_column_and_its_work_alone_is_done_again(attacked):
    hard = ROWS.replace("synonyms", "synonyms,training.harden.every").replace("sulking cat", "sulking cat,{}")
    attacked.write(hard.format(2))
    refused = attacked.snakemake("--dry-run", "--configfile", "small.yaml")
    assert (
        "concepts.csv:2: training.harden.every is 2, so none of 2 steps comes after an attack"
        in refused.stdout
    )
    attacked.write(hard.format(1))
    own = dict.fromkeys(
        ("ablate_concept", "sample_ablated", "score_concept", "probe_wordings", "attack_concept"), 1
    )
    assert attacked.jobs("small.yaml") == own | REPORT
    done = attacked.snakemake("--cores", "1", "--configfile", "small.yaml", "--until", "ablate_concept")
    assert done.returncode == 0, done.stdout
    made = [
        read_metadata(file) for file in (attacked.folder / "results/concepts").glob("*/delta.safetensors")
    ]
    assert sorted(one.get("harden", {}).get("every", 0) for one in made) == [0, 1]
