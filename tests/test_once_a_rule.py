"""Snakemake works out once a rule what is the same for all its jobs (`concept_ablation.jobs.once_a_rule`)."""

from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import snakemake.api  # before snakemake.dag, which needs it
import snakemake.common
import snakemake.rules
from snakemake.dag import NotebookProcessor, ScriptProcessor
from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Params, Wildcards
from snakemake.jobs import Job
from snakemake.sourcecache import SourceCache

from concept_ablation.jobs.once_a_rule import do_once_a_rule


class Counting(SourceCache):
    """A source cache that counts what is read of it."""

    opened = 0

    def open(self, *arguments, **options):
        self.opened += 1
        return super().open(*arguments, **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Counting:
    # All is put back at the end.
    monkeypatch.setattr(ScriptProcessor, "process_job", ScriptProcessor.process_job)
    monkeypatch.setattr(Job, "conda_env_spec", Job.conda_env_spec)
    for module in (snakemake.common, snakemake.rules):
        monkeypatch.setattr(module, "get_function_params", module.get_function_params)
    do_once_a_rule.__wrapped__()  # as in a new process
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


def test_a_signature_is_looked_up_once(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(
        snakemake.common.inspect, "signature", lambda function: asked.append(function) or signature(function)
    )

    def upstream(wildcards, attempt):
        return wildcards, attempt

    for _ in range(3):
        assert snakemake.common.get_input_function_aux_params(upstream, {"attempt": 2, "input": []}) == {
            "attempt": 2
        }
        assert list(snakemake.rules.get_function_params(upstream)) == ["wildcards", "attempt"]
    assert asked == [upstream]


def test_a_callable_that_cant_be_hashed_is_looked_up_each_time(cache):
    class Chosen:
        __hash__ = None

        def __call__(self, wildcards, attempt):
            return attempt

    for _ in range(2):
        assert list(snakemake.rules.get_function_params(Chosen())) == ["wildcards", "attempt"]


def test_an_environment_of_one_file_takes_no_parameters(cache):
    class Unasked(SimpleNamespace):
        params = input = property(lambda job: pytest.fail("a job's parameters were filled in"))

    expanded = []
    rule = SimpleNamespace(
        conda_env="one.yaml", expand_conda_env=lambda wildcards: expanded.append(wildcards) or "one"
    )
    job = Unasked(rule=rule, _conda_env_spec=None, wildcards_dict={"key": "a"})
    assert [Job.conda_env_spec.fget(job) for _ in range(2)] == ["one", "one"]
    assert expanded == [{"key": "a"}]


def test_an_environment_that_a_function_chooses_does(cache):
    def expand(wildcards, parameters, read):
        return parameters, read

    rule = SimpleNamespace(conda_env=lambda wildcards, params: params, expand_conda_env=expand)
    job = SimpleNamespace(
        rule=rule, _conda_env_spec=None, wildcards_dict={}, params=["fast"], input=["a.json"]
    )
    assert Job.conda_env_spec.fget(job) == (["fast"], ["a.json"])
