"""Every kind, group, loss and preset does what it says on the embedded model: `make test-world` (about 15 minutes).

The rows are in concepts.csv beside this file; the run goes to results/world and is used again when it is there.
"""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.world
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "results" / "world" / "report"


@pytest.fixture(scope="session")
def summary() -> dict[str, dict]:
    """The summary's lines by concept, after the run."""
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--configfile", "tests/world/config.yaml"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return {line["concept"]: line for line in pq.read_table(REPORT / "summary.parquet").to_pylist()}


def scores(concept: str, metric: str) -> dict[tuple[str, str], float]:
    """(probe, model) -> value of one metric of one row."""
    rows = pq.read_table(REPORT / "scores.parquet").to_pylist()
    return {
        (row["probe"], row["model"]): row["value"]
        for row in rows
        if row["concept"] == concept and row["metric"] == metric
    }


ROWS = [
    "paper-preset",
    "diffusers-preset",
    "noise-based",
    "attention",
    "all-weights",
    "tokens",
    "memorized",
    "unsafe",
    "unsafe-terms",
]


@pytest.mark.parametrize("concept", ROWS)
def test_the_target_goes_and_the_neighbors_stay(summary, concept):
    line = summary[concept]
    assert line["presence_base"] >= 0.75 and line["presence_ablated"] <= 0.25, line["verdict"]
    assert line["neighbor_recognition_change"] >= -0.15


def test_two_styles_of_one_row_both_go(summary):
    found = scores("two-styles", "clip_accuracy")
    for style in ("neon", "pencil"):
        assert found[style, "base"] >= 0.75 and found[style, "ablated"] <= 0.25, style
    assert summary["two-styles"]["neighbor_recognition_change"] >= -0.15


def test_a_memorized_picture_goes_and_its_content_stays(summary):
    assert summary["memorized"]["measure"] == "copy_rate"
    assert summary["memorized"]["presence_base"] >= 0.9 and summary["memorized"]["presence_ablated"] <= 0.1
    content = scores("memorized", "content")
    assert content["the haunted orchestra album", "ablated"] >= 0.8
