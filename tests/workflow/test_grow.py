"""The worked example of CONTRIBUTING.md: a kind, a method and a metric, each by one file and one line, through the workflow."""

import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from tests.workflow.conftest import ROOT, SMALL

pytestmark = pytest.mark.workflow
HEAD = re.compile(r'```python\n# (concept_ablation/\S+\.py), in (\w+): ("[^\n]*")\n(.*?)```', re.DOTALL)
ROWS = """concept,kind,target,anchor,neighbors,method,steps
gold,material,gold,cat,silver,fade,
plain,material,gold,cat,silver,,2
"""


@pytest.fixture(scope="module")
def grown(make_checkout):
    """A checkout with the example's three files and lines, in which ROWS were run."""
    checkout = make_checkout()
    package = checkout.folder / "concept_ablation"
    package.unlink()
    shutil.copytree(ROOT / "concept_ablation", package, ignore=shutil.ignore_patterns("__pycache__"))
    registries = package / "registries.py"
    examples = HEAD.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {table for _, table, _, _ in examples} == {"KINDS", "METHODS", "METRICS"}
    for file, table, line, content in examples:
        (checkout.folder / file).write_text(content, encoding="utf-8")
        head, start, rest = registries.read_text(encoding="utf-8").partition(f"{table} = Registry(")
        registries.write_text(head + start + rest.replace("{", f"{{{line}, ", 1), encoding="utf-8")
    checkout.write(ROWS)
    own = {
        **SMALL,
        "evaluation": {**SMALL["evaluation"], "images": {"target": 4, "anchor": 4, "neighbor": 4}},
    }
    (checkout.folder / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    done = checkout.snakemake("--cores", "2", "--configfile", "own.yaml", PYTHONPATH=str(checkout.folder))
    assert done.returncode == 0, done.stdout
    return checkout


def test_rows_of_the_new_words_are_in_both_tables(grown):
    report = grown.folder / "results" / "report"
    summary = {line["concept"]: line for line in pq.read_table(report / "summary.parquet").to_pylist()}
    assert summary.keys() == {"gold", "plain"} and {line["kind"] for line in summary.values()} == {"material"}
    assert all(line["measure"] == "clip_accuracy" for line in summary.values())
    assert all(0 < line["target_brightness_base"] < 255 for line in summary.values())
    scores = pq.read_table(report / "scores.parquet").to_pylist()
    found = {(line["concept"], line["role"]) for line in scores if line["metric"] == "brightness"}
    assert {(name, role) for name in summary for role in ("target", "anchor", "neighbor")} <= found
    assert {line["unit"] for line in scores if line["metric"] == "brightness"} == {"grey levels"}


def test_the_method_makes_the_delta_and_asks_for_no_pictures_of_the_anchor(grown):
    results = grown.folder / "results"
    assert len(list((results / "anchors").iterdir())) == 1  # of the row that trains
    assert len(list((results / "concepts").iterdir())) == 2
    summary = pq.read_table(results / "report" / "summary.parquet").to_pylist()
    steps = {line["concept"]: line["steps"] for line in summary}
    assert not steps["gold"] and steps["plain"] == 2


def test_the_page_shows_the_new_words(grown):
    page = (grown.folder / "results" / "report" / "index.html").read_text(encoding="utf-8")
    assert "material: gold → cat" in page and "<code>brightness</code>" in page
    assert "a cat made of gold" in page


def test_the_settings_of_a_method_are_checked_as_any_other(grown):
    grown.write(
        ROWS.replace("steps\n", "method.fade.strength\n").replace(",fade,", ",fade,2").replace(",,2", ",,")
    )
    done = grown.snakemake("--dry-run", "--configfile", "own.yaml", PYTHONPATH=str(grown.folder))
    assert done.returncode != 0 and "method.fade.strength" in done.stdout and "at most 1" in done.stdout
    grown.write(ROWS)
