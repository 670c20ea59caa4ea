"""A job's view of the plan of its run."""

import json
import os

import pytest

from concept_ablation.plan.graph import Plan
from concept_ablation.plan.snapshot import VARIABLE, delete_snapshot, load_snapshot, save_snapshot


@pytest.fixture
def plan():
    made = Plan("results", {"target_max": 0.2}, {"open_rows": 1})
    prompts = made.add("write_prompts", "cat", {"anchor": "Kätzchen", "count": 2})
    made.add("generate_anchors", "cat", {"prompts": prompts, "images": 4})
    base = {
        subject: made.add("sample_base", subject, {"subject": subject}) for subject in ("owl", "bird", "duck")
    }
    made.add("score_concept", "owl", {"base": base})
    return made


def test_a_job_finds_its_work_as_the_run_planned_it(plan, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "of another run")
    file = save_snapshot(plan, {"runtime": {"threads": 3}}, tmp_path / "a folder#1?")
    assert os.environ[VARIABLE] == str(file)
    handed = load_snapshot()
    assert handed.config == {"runtime": {"threads": 3}} and handed.results == "results"
    (key,) = plan.specs["generate_anchors"]
    assert handed.spec("generate_anchors", key) == plan.spec("generate_anchors", key)
    assert handed.upstream("generate_anchors", key, "prompts") == plan.upstream(
        "generate_anchors", key, "prompts"
    )
    assert handed.path(key) == plan.path(key)
    assert handed.report_spec() == plan.report_spec() and json.loads(handed.report_spec())["rows"] == []
    assert handed.pending_files() == plan.pending_files() and handed.goals() == plan.goals()
    delete_snapshot()
    assert not file.exists() and VARIABLE not in os.environ


@pytest.mark.parametrize("named", [None, "gone.sqlite"])
def test_without_the_runs_plan_a_job_reads_the_table(named, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if named:
        monkeypatch.setenv(VARIABLE, str(tmp_path / named))
    assert load_snapshot() is None


def test_work_that_the_run_did_not_plan_is_no_work(plan, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    save_snapshot(plan, {}, tmp_path)
    with pytest.raises(KeyError, match="unknown"):
        load_snapshot().spec("generate_anchors", "unknown.000000000000")
