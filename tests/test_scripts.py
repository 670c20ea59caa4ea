"""Snakemake checks a script once, not once a job (`concept_ablation.jobs.scripts`)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import snakemake.api  # noqa: F401, which has to be imported before snakemake.dag
from snakemake.dag import NotebookProcessor, ScriptProcessor
from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Params, Wildcards
from snakemake.sourcecache import SourceCache

from concept_ablation.jobs.scripts import check_scripts_once


class Counting(SourceCache):
    """A source cache that counts what is read of it."""

    opened = 0

    def open(self, *arguments, **options):
        self.opened += 1
        return super().open(*arguments, **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Counting:
    monkeypatch.setattr(ScriptProcessor, "process_job", ScriptProcessor.process_job)  # put back at the end
    check_scripts_once()
    return Counting(tmp_path / "cache")


def job(script: object = None, notebook: object = None, **wildcards: str) -> SimpleNamespace:
    rule = SimpleNamespace(script=script, notebook=notebook, basedir=None)
    return SimpleNamespace(
        rule=rule,
        is_script=script is not None,
        is_notebook=notebook is not None,
        wildcards=Wildcards(fromdict=wildcards),
        params=Params(),
    )


def processor(kind, cache: SourceCache):
    dag = SimpleNamespace(workflow=SimpleNamespace(sourcecache=cache))
    dag.is_edit_notebook_job = dag.is_draft_notebook_job = lambda job: False
    return kind(dag)


def test_a_script_is_read_for_the_first_job_alone(cache, tmp_path):
    (tmp_path / "one.py").write_text("")
    checked = processor(ScriptProcessor, cache)
    for _ in range(3):
        checked.process_job(job(script=str(tmp_path / "one.py")))
    assert cache.opened == 1
    processor(NotebookProcessor, cache).process_job(job(script=str(tmp_path / "one.py")))
    assert cache.opened == 1


def test_a_missing_script_is_still_an_error_each_time(cache, tmp_path):
    for _ in range(2):
        with pytest.raises((WorkflowError, OSError)):
            processor(ScriptProcessor, cache).process_job(job(script=str(tmp_path / "gone.py")))


def test_a_script_that_depends_on_the_job_is_read_for_each(cache, tmp_path):
    (tmp_path / "a.py").write_text("")
    checked = processor(ScriptProcessor, cache)
    checked.process_job(job(script=f"{tmp_path}/{{wildcards.key}}.py", key="a"))
    with pytest.raises((WorkflowError, OSError)):
        checked.process_job(job(script=f"{tmp_path}/{{wildcards.key}}.py", key="b"))
