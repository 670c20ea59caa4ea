"""Hostile rows through a real run: nothing runs, no file lies outside the results, the page and the CSV show them inert."""

import csv

import pytest
from markupsafe import escape

pytestmark = pytest.mark.workflow
HEADER = "kind,target,anchor,neighbors\n"
# What a shell, Python, SQL, a path, a page, a template and a spreadsheet would stumble over, as few rows as can be.
TARGETS = [
    "$(touch canary) `touch canary` '|touch canary #",
    "=cmd|' /C calc'!A0 {config[results]} {0} %s ${HOME}",
    '../../../canary <script>alert("x")</script> \\" \'"\'',
]
NEIGHBOR = "@SUM(1) <img src=x onerror=alert(1)> \u05d0\u05d1"


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def test_hostile_rows_run_to_the_end_and_nothing_of_them_runs(make_checkout):
    checkout = make_checkout()
    rows = [f"style,{cell(target)},picture,{cell(NEIGHBOR)}\n" for target in TARGETS]
    checkout.write(HEADER + "".join(rows))
    before = set(checkout.folder.iterdir()) | set(checkout.folder.parent.iterdir())
    done = checkout.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    new = (set(checkout.folder.iterdir()) | set(checkout.folder.parent.iterdir())) - before
    assert {path.name for path in new} <= {"results", ".snakemake"}, new
    assert not list(checkout.folder.rglob("canary"))
    names = [path.name for path in (checkout.folder / "results").rglob("*")]
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        for name in names
    )

    page = (checkout.folder / "results" / "report" / "index.html").read_text()
    for target in TARGETS:
        assert str(escape(target)) in page
    assert "<script>alert" not in page and "<img src=x" not in page and "default-src 'none'" in page
    for name in ("summary", "scores"):
        with (checkout.folder / "results" / "report" / f"{name}.csv").open(newline="") as file:
            cells = [value for line in csv.reader(file) for value in line]
        texts = [value for value in cells if value[:1] in "=+-@\t\r" and not is_number(value)]
        assert texts == [] or texts == [""] * len(texts), texts
        assert any(value.startswith("'=cmd") for value in cells)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
