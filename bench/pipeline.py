"""Where the time of a finished run went: a table of all its core-seconds, wall time x cores, by part; and one by stage.

    python bench/pipeline.py results                   # the newest log below .snakemake/log beside the folder
    python bench/pipeline.py results --log .snakemake/log/2026-01-02T030405.678901.snakemake.log

Read are Snakemake's log (which job ran when, from which files), the benchmarks (seconds, to a hundredth) and the end of the jobs' logs
(the parts of their seconds, CPU seconds, memory; `concept_ablation/common/parts.py`). A core that no job has is *idle* where no job's inputs
were there, and Snakemake's where a job could have started; so is the time before the first job and after the last one. *start-up* is a
job's time outside of its own clock, too: its script's Python, the fork, the end.

A job whose log doesn't tell its parts counts whole to its stage's main part. What Snakemake's process does before its log begins (Python's
start, some 1 to 2 s) is in no log. CPU seconds beside core-seconds show what the machine did for others meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from concept_ablation.common.logs import read_took
from concept_ablation.common.parts import MAIN, PARTS, read_spent
from concept_ablation.registries import STAGES

REPORT, OWN, IDLE = "report", "Snakemake", "idle"
ROWS = (*PARTS, REPORT, OWN, IDLE)
STAMP, DAY = re.compile(r"^\[(\w{3} \w{3} [ \d]\d [\d:]{8} \d{4})\]$"), "%a %b %d %H:%M:%S %Y"
FIELD = re.compile(r"^    (\w+): (.*)$")
ROUNDING = 1.5  # seconds that Snakemake's times and a benchmark's may differ by


@dataclass
class Job:
    """A job of a run: its rule and files, and when it began and ended, in seconds since 1970."""

    rule: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    benchmark: str
    log: str
    threads: int
    began: float
    ended: float = 0.0


@dataclass
class Run:
    """A run: its jobs, its cores, and when it began and ended."""

    jobs: list[Job]
    cores: int
    began: float
    ended: float

    @property
    def whole(self) -> float:
        """Core-seconds."""
        return (self.ended - self.began) * self.cores


def read_run(log: Path, folder: Path) -> Run:
    """The run that Snakemake's log tells of; `folder`: its working directory. Raises SystemExit if the run isn't finished."""
    text = log.read_text(encoding="utf-8")
    cores, took = (
        re.search(rf"^{name}: (\S+)", text, re.MULTILINE) for name in ("Provided cores", "Elapsed time")
    )
    if not (cores and took):
        raise SystemExit(
            f"{log}: not the log of a finished run on one machine: it lacks its cores or its elapsed time"
        )
    hours, minutes, seconds = map(float, took[1].split(":"))
    began = datetime.strptime(log.name.removesuffix(".snakemake.log"), "%Y-%m-%dT%H%M%S.%f").timestamp()
    jobs = dict(_jobs(text.splitlines()))
    for job in jobs.values():
        _measure(job, folder)
    ended = began + 3600 * hours + 60 * minutes + seconds
    return Run(sorted(jobs.values(), key=lambda job: job.began), int(cores[1]), began, ended)


def _jobs(lines: Sequence[str]) -> Iterator[tuple[str, Job]]:
    """The jobs of a log by their numbers; one that was started again counts at its last start."""
    now, places = 0.0, []
    for line in lines:
        if found := STAMP.match(line):
            now = datetime.strptime(found[1], DAY).timestamp()
        places.append(now)
    ends = {
        found[1]: places[i]
        for i, line in enumerate(lines)
        if (found := re.match(r"Finished jobid: (\d+)", line))
    }
    for place, line in enumerate(lines):
        if not (found := re.match(r"(?:local)?(?:rule|checkpoint) (\w+):$", line)):
            continue
        fields = {}
        for part in lines[place + 1 :]:
            if not (field := FIELD.match(part)):
                break
            fields[field[1]] = field[2]
        files = [tuple(filter(None, fields.get(name, "").split(", "))) for name in ("input", "output")]
        names = [fields.get(name, "").split(", ")[0] for name in ("benchmark", "log")]
        number = fields["jobid"]
        if number in ends:
            times = int(fields.get("threads", 1)), places[place], ends[number]
            yield number, Job(found[1], *files, *names, *times)


def _measure(job: Job, folder: Path) -> None:
    """Take a job's times from its benchmark, if that is of this run."""
    file = folder / job.benchmark
    if not (job.benchmark and file.is_file()):
        return
    with file.open(encoding="utf-8", newline="") as opened:
        seconds = float(list(csv.DictReader(opened, delimiter="\t"))[-1]["s"])
    ended = file.stat().st_mtime
    if abs(ended - job.ended) <= ROUNDING:  # else a later run made it again
        job.began, job.ended = ended - seconds, ended


def free_cores(run: Run) -> dict[str, float]:
    """The core-seconds that no job has: Snakemake's, while a job waits that could start, and idle ones."""
    made = {file: job.ended for job in run.jobs for file in job.outputs}
    works = [job for job in run.jobs if job.outputs]  # all but the rule that only asks for files
    ready = [max([run.began, *(made[file] for file in job.inputs if file in made)]) for job in run.jobs]
    changes = defaultdict(Counter)  # time -> what it adds to the running threads and to the waiting ones
    for job, since in zip(run.jobs, ready, strict=True):
        begins = job.began if job.outputs else run.ended
        changes[min(since, begins)]["waiting"] += job.threads
        changes[begins]["waiting"] -= job.threads
    for job in works:
        changes[job.began]["running"] += job.threads
        changes[job.ended]["running"] -= job.threads
    found, state, times = dict.fromkeys((OWN, IDLE), 0.0), Counter(), sorted({*changes, run.began, run.ended})
    for time, then in pairwise(times):
        state.update(changes[time])  # adds, also what is negative
        free = run.cores - state["running"]
        own = min(max(free, 0), max(state["waiting"], 0))
        found[OWN] += own * (then - time)
        found[IDLE] += (free - own) * (then - time)
    return found


def parts_of(job: Job, folder: Path) -> dict[str, float]:
    """A job's core-seconds by part."""
    seconds = (job.ended - job.began) * job.threads
    if job.rule not in STAGES:
        return {REPORT: seconds}
    told = read_spent(folder / job.log)
    if told is None:
        return {MAIN.get(job.rule, "rest"): seconds}
    found = {name: value * job.threads for name, value in told.items()}
    found["start-up"] += seconds - sum(found.values())
    return found


def tables(run: Run, folder: Path) -> Iterator[str]:
    """Both tables, in Markdown."""
    works = [job for job in run.jobs if job.outputs]
    found = {id(job): parts_of(job, folder) for job in works}
    whole = Counter(free_cores(run))
    for own in found.values():
        whole.update(own)
    wall = run.ended - run.began
    yield f"{len(run.jobs)} jobs, {wall / 60:.1f} minutes on {run.cores} cores\n"
    yield "| part | core-seconds | share |\n|---|---|---|"
    for name in ROWS:
        yield f"| {name} | {whole[name]:.0f} | {whole[name] / run.whole:.1%} |"
    yield f"| sum (wall x cores: {run.whole:.0f}) | {sum(whole.values()):.0f} | {sum(whole.values()) / run.whole:.1%} |\n"
    names = [name for name in (*PARTS, REPORT) if whole[name]]
    yield f"| stage | jobs | core-seconds | {' | '.join(names)} | CPU s | most MB |\n|{'---|' * (5 + len(names))}"
    for rule in [*STAGES, REPORT]:
        jobs = [job for job in works if (job.rule if job.rule in STAGES else REPORT) == rule]
        if jobs:
            yield _stage_line(rule, jobs, [found[id(job)] for job in jobs], names, folder)
    untold = sum(job.rule in STAGES and read_spent(folder / job.log) is None for job in works)
    if untold:
        yield f"\n{untold} jobs whose logs don't tell parts count whole to their stage's main part."


def _stage_line(
    rule: str, jobs: Sequence[Job], found: Iterable[Mapping[str, float]], names: Sequence[str], folder: Path
) -> str:
    total = Counter()
    for own in found:
        total.update(own)
    took = [told for job in jobs if (told := read_took(folder / job.log))]
    cpu, memory = sum(seconds for seconds, _ in took), max((most for _, most in took), default=0.0)
    cells = " | ".join(f"{total[name]:.0f}" for name in names)
    return f"| {rule} | {len(jobs)} | {sum(total.values()):.0f} | {cells} | {cpu:.0f} | {memory:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the results folder of a finished run")
    parser.add_argument("--log", type=Path, help="Snakemake's log of that run; without it the newest one")
    options = parser.parse_args()
    folder = options.results.resolve().parent
    logs = sorted((folder / ".snakemake" / "log").glob("*.snakemake.log"))
    if not (options.log or logs):
        raise SystemExit(f"{folder}: no .snakemake/log/*.snakemake.log here; name one with --log")
    run = read_run(options.log or logs[-1], folder)
    print("\n".join(tables(run, folder)))


if __name__ == "__main__":
    main()
