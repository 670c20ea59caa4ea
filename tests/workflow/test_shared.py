"""A results folder that two checkouts share: equal work is done once, and nothing of one is made again by the other."""

import pytest
import yaml

from tests.workflow.conftest import CAT, HEADER, INK, SMALL

pytestmark = pytest.mark.workflow
REPORT = {"aggregate_scores", "render_report"}


@pytest.fixture(scope="module")
def second(finished, make_checkout):
    """Another checkout, whose config names the first one's results by their absolute path."""
    checkout = make_checkout()
    own = {**SMALL, "results": str(finished.folder / "results")}
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    yield checkout
    checkout.write(HEADER + CAT + INK)  # the report as the first one made it
    done = checkout.snakemake("--cores", "1", "--configfile", "small.yaml", "--forcerun", "aggregate_scores")
    assert done.returncode == 0, done.stdout


def contents(folder):
    """Each stage's files with their times."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found if path.relative_to(folder).parts[0] != "report"}


def test_the_second_checkout_reruns_nothing(finished, second):
    before = contents(finished.folder / "results")
    second.write(HEADER + CAT + INK)
    assert set(second.jobs("small.yaml")) <= REPORT
    done = second.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    assert contents(finished.folder / "results") == before
    assert not (second.folder / "results").exists()


def test_a_row_of_its_own_is_all_that_it_adds(finished, second):
    second.write(HEADER + CAT + "new,object,grinning cat,cat,weary cat,\n")
    jobs = second.jobs("small.yaml")
    assert {rule for rule in jobs if rule not in REPORT} == {
        "ablate_concept",
        "sample_ablated",
        "sample_base",
        "score_concept",
    }
    assert jobs["ablate_concept"] == 1 and jobs["sample_base"] == 1


def test_the_report_of_another_table_is_noticed_and_made_again_when_asked(finished, second):
    second.write(HEADER + CAT)
    told = second.snakemake("--dry-run", "--configfile", "small.yaml")
    assert told.returncode == 0 and "holds the report of other rows than the table's" in told.stdout
    summary = finished.folder / "results" / "report" / "summary.csv"
    assert '"ink"' in summary.read_text()
    done = second.snakemake("--cores", "1", "--configfile", "small.yaml", "--forcerun", "aggregate_scores")
    assert done.returncode == 0, done.stdout
    assert '"ink"' not in summary.read_text() and '"cat"' in summary.read_text()
    again = second.snakemake("--dry-run", "--configfile", "small.yaml")
    assert "holds the report of other rows" not in again.stdout and "Nothing to be done" in again.stdout
