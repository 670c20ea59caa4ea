"""One row that fails: the others finish, the report says what failed and why, and a later run makes all whole."""

import csv

import pytest
from safetensors.numpy import save_file

from tests.workflow.conftest import CAT

pytestmark = pytest.mark.workflow
HEADER = "concept,kind,target,anchor,neighbors,delta\n"
BAD = "<b>bad.safetensors"
TABLE = HEADER + CAT + f"owl,object,owl,bird,,{BAD}\n"
RUN = ("--cores", "2", "--configfile", "small.yaml")


@pytest.fixture(scope="module")
def failed(make_checkout):
    """A checkout after a run in which row `owl` failed and row `cat` did not; what was said is in run.txt."""
    import numpy as np

    checkout = make_checkout()
    save_file({"x": np.zeros(2, np.float32)}, checkout.folder / BAD)
    checkout.write(TABLE)
    done = checkout.snakemake(*RUN)
    assert done.returncode != 0
    (checkout.folder / "run.txt").write_text(done.stdout)
    return checkout


def concepts(checkout, table: str = "summary") -> list[str]:
    with (checkout.folder / "results" / "report" / f"{table}.csv").open() as file:
        return [line["concept"] for line in csv.DictReader(file)]


def test_the_terminal_says_in_one_line_why_and_shows_no_traceback(failed):
    said = (failed.folder / "run.txt").read_text()
    assert "import_delta failed, for owl (log: results/logs/import_delta/" in said
    assert "which is no delta" in said and "run the same command again" in said
    assert "Traceback" not in said
    (log,) = (failed.folder / "results" / "logs" / "import_delta").glob("*.log")
    assert "Traceback" in log.read_text()


def test_the_report_shows_the_finished_row_and_the_failure(failed):
    assert concepts(failed) == ["cat"] and set(concepts(failed, "scores")) == {"cat"}
    page = (failed.folder / "results" / "report" / "index.html").read_text()
    assert "<code>import_delta</code> failed for owl" in page and "which is no delta" in page
    assert "&lt;b&gt;bad" in page and "<b>bad" not in page


def test_an_unfinished_report_is_never_up_to_date(failed):
    """Whatever the user does next, repair the row or take it out, the report is made again."""
    failed.write(HEADER + CAT)
    try:
        assert failed.jobs("small.yaml") == {"aggregate_scores": 1, "render_report": 1}
    finally:
        failed.write(TABLE)


def test_a_repaired_row_makes_the_report_whole(failed):
    failed.write(TABLE.replace(BAD, ""))
    done = failed.snakemake(*RUN)
    assert done.returncode == 0, done.stdout
    assert concepts(failed) == ["cat", "owl"]
    assert "This report is not whole" not in (failed.folder / "results" / "report" / "index.html").read_text()
    assert failed.jobs("small.yaml") == {}


def test_without_any_finished_row_there_is_a_page_of_failures(make_checkout):
    checkout = make_checkout()
    (checkout.folder / "bad.bin").write_bytes(b"no delta")
    checkout.write(HEADER + "owl,object,owl,bird,,bad.bin\n")
    done = checkout.snakemake(*RUN)
    assert done.returncode != 0 and "import_delta failed, for owl" in done.stdout, done.stdout
    page = (checkout.folder / "results" / "report" / "index.html").read_text()
    assert "No concept is finished yet" in page and "failed for owl" in page
    assert concepts(checkout) == []
