"""What Snakemake works out for each job, although it is the same for all jobs of a rule: worked out once.

10,000 rows are 60,000 jobs of a dozen rules. Results are as before: only work that can't depend on the job is left out.
"""

from __future__ import annotations

import functools

import snakemake.api  # before snakemake.dag, which needs it
import snakemake.common
import snakemake.rules
from snakemake.dag import ScriptProcessor
from snakemake.jobs import Job


@functools.cache  # a second Snakefile of the same process finds it done
def do_once_a_rule() -> None:
    """From now on scripts are read, signatures looked up and conda environments expanded for a rule's first job alone."""
    ScriptProcessor.process_job = _checked_once(ScriptProcessor.process_job)
    looked_up = _looked_up_once(snakemake.common.get_function_params)
    snakemake.common.get_function_params = snakemake.rules.get_function_params = looked_up
    Job.conda_env_spec = _without_parameters(Job.conda_env_spec)


def _checked_once(check):
    """Snakemake makes sure that each job's script is there, and reads it anew for every job."""
    checked = set()

    def process_job(processor: ScriptProcessor, job) -> None:
        script = str(getattr(job.rule, processor.script_type))
        place = (processor.script_type, script, str(job.rule.basedir))
        if place in checked:
            return
        check(processor, job)
        if "{" not in script:  # else it depends on the job
            checked.add(place)

    return process_job


def _looked_up_once(parameters_of):
    """Snakemake asks twice for the parameters of each input function, `params` function and resource whenever it calls one."""
    known = functools.lru_cache(1024)(parameters_of)

    def get_function_params(func):
        try:
            return known(func)
        except (
            TypeError
        ):  # a callable object that can't be hashed, in a workflow that uses this one as a module
            return parameters_of(func)

    return get_function_params


def _without_parameters(spec: property) -> property:
    """Snakemake fills in a job's parameters to tell its conda environment, also where the rule names one file for all jobs."""

    def conda_env_spec(job: Job):
        if callable(job.rule.conda_env):
            return spec.fget(job)
        if job._conda_env_spec is None:
            job._conda_env_spec = job.rule.expand_conda_env(job.wildcards_dict)
        return job._conda_env_spec

    return property(conda_env_spec)
