"""`make check`: the config, the table and every row's prompts are read, and nothing runs."""

from pathlib import Path

import pytest
import yaml

from concept_ablation.__main__ import main

ROOT = Path(__file__).parents[1]
GOOD = "concept,kind,target,anchor,neighbors\nowl,object,owl,bird,penguin\n"


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """`check(table, config)` gives the exit status and what was said of a table in a checkout of its own."""
    monkeypatch.chdir(ROOT)

    def run(table: str, config: dict | None = None) -> tuple[int, str]:
        (tmp_path / "rows.csv").write_text(table)
        overlay = {"concepts": str(tmp_path / "rows.csv"), **(config or {})}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
        status = main(["check", "--configfile", str(tmp_path / "own.yaml")])
        said = capsys.readouterr()
        return status, (said.out + said.err).replace(str(tmp_path) + "/", "")

    return run


def test_the_shipped_rows_have_nothing_to_say(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for overlay in ([], ["--configfile", "config/sd14.yaml"]):
        assert main(["check", *overlay]) == 0
        assert "0 warnings" in capsys.readouterr().out


def test_warnings_name_the_line_and_leave_the_status_alone(check):
    status, said = check(GOOD + "cat,object,pouting cat,cat,cats\n")
    assert status == 0 and "rows.csv:3: warning: neighbor 'cats' is the anchor 'cat'" in said
    assert "2 rows read, 1 warnings" in said


def test_prompts_that_can_teach_nothing_are_an_error(check, tmp_path):
    (tmp_path / "same.txt").write_text("a dog\n")
    table = f"concept,kind,target,anchor,prompts\nowl,object,owl,bird,{tmp_path / 'same.txt'}\n"
    status, said = check(table)
    assert status == 2 and "rows.csv:2" in said and "holds the anchor 'bird'" in said


def test_mistakes_of_config_and_table_are_told_as_in_a_run(check):
    status, said = check(GOOD, {"training": {"stepz": 1}})
    assert status == 2 and "training.stepz: unknown key (did you mean 'steps'?)" in said
    status, said = check(GOOD + "x,styel,a,b,\n")
    assert status == 2 and "rows.csv:3: column 'kind': 'styel' is not one of" in said
