"""A run in a terminal: a line for each job that runs, the verdict of each row as it is finished, and how long the rest will take.

Snakemake's own lines, twenty a job, go to its log file alone. This shows the same events: it stands in for Snakemake's handler of the
terminal while jobs run (`show`, `end`). Where stderr is no terminal, or more than one handler was asked for, nothing is replaced, and
Snakemake's lines come as always. It is no logger plugin of Snakemake's, since such a plugin has to be installed wherever a profile names
it, also where this checkout is used without being installed.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from concept_ablation.common.errors import UserError
from concept_ablation.common.progress import VARIABLE, Progress, read_progress
from concept_ablation.plan.graph import Plan, Row
from concept_ablation.plan.reported import reported_row
from concept_ablation.report.formatting import duration, points, printable, share
from concept_ablation.report.status import read_costs, unfinished_keys

STANDARD = "DefaultStreamHandler"
"""The name of Snakemake's handler of the terminal."""
BESIDE = 52
"""What a job's line needs beside its name and its bar: the longest rule, "about 1 h 20 min left", "20 min", and the gaps."""
STYLES = {"good": "green", "bad": "red", "warn": "yellow"}


@dataclass
class Running:
    """A job that runs: its rule, its key (None for a job of the whole table), its log, and when it began."""

    rule: str
    key: str | None
    log: str | None
    began: float = field(default_factory=time.monotonic)


class RunState:
    """What a run has done and what is left, from Snakemake's events."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.left = Counter(plan.stages[key] for key in unfinished_keys(plan))
        self.before = read_costs(plan.results).seconds
        self.took: dict[str, list[float]] = {}
        self.running: dict[int, Running] = {}
        self.done, self.total = 0, sum(self.left.values())
        self.rows: dict[str, list[tuple[str, Row]]] = {}
        for place, row in _rows(plan):
            self.rows.setdefault(row.scores, []).append((place, row))

    def finish(self, number: int) -> Running | None:
        """A job is done."""
        job = self.running.pop(number, None)
        if job:
            self.left[job.rule] -= 1
            self.took.setdefault(job.rule, []).append(time.monotonic() - job.began)
        return job

    def seconds_left(self) -> float | None:
        """How long the rest will take at the present number of jobs at once; None while a stage of it wasn't measured yet."""
        total = 0.0
        # Copies, since the display's thread asks while jobs begin and end.
        for stage, count in list(self.left.items()):
            if count > 0:
                known = self.took.get(stage) or [self.before[name] for name in [stage] if name in self.before]
                if not known:
                    return None
                total += count * statistics.mean(known)
        spent = sum(time.monotonic() - job.began for job in list(self.running.values()))
        return max(0.0, total - spent) / max(1, len(self.running))


class TerminalHandler(logging.Handler):
    """Snakemake's log records as a live display. `console`: where it is drawn; `folder`: where the jobs tell their progress."""

    def __init__(self, plan: Plan, console: Console, folder: str) -> None:
        super().__init__()
        self.state, self.console, self.folder, self.began = RunState(plan), console, folder, time.monotonic()
        self.live = Live(console=console, get_renderable=self.draw, refresh_per_second=4, transient=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Take in what a record tells. Warnings and errors are printed."""
        try:
            event = getattr(record, "event", None)
            handler = getattr(self, f"_{event}", None) if event else None
            if handler:
                handler(record)
            elif record.levelno >= logging.WARNING and record.msg:
                self.say(Text(str(record.msg), style="red" if record.levelno >= logging.ERROR else "yellow"))
        except Exception:  # noqa: BLE001, as logging does: a display mustn't end a run
            self.handleError(record)

    def say(self, text: Text) -> None:
        """Print a line above the jobs."""
        self.console.print(text, soft_wrap=True)

    def _job_info(self, record: logging.LogRecord) -> None:
        log = str(record.log[0]) if record.log else None
        self.state.running[record.jobid] = Running(record.rule_name, record.wildcards.get("key"), log)

    def _job_finished(self, record: logging.LogRecord) -> None:
        job = self.state.finish(record.job_id)
        if job and job.rule == "score_concept":
            for place, row in self.state.rows.get(str(job.key), []):
                self._say_verdict(place, row)

    def _say_verdict(self, place: str, row: Row) -> None:
        # Imported here: planning, of which this module is a part, loads no pyarrow.
        from concept_ablation.report.console import TERMINAL_MARKS
        from concept_ablation.report.summary import summarise
        from concept_ablation.report.tables import read_scores
        from concept_ablation.report.triage import VERDICT_COLORS
        from concept_ablation.verdict import Thresholds

        plan = self.state.plan
        told = reported_row(plan, row)
        try:
            line = summarise(told, read_scores(told["scores"]), Thresholds(**plan.report["verdict"]))
        except (OSError, UserError):  # the report will say what is wrong
            return
        color = VERDICT_COLORS.get(line["verdict"], "")
        mark = (TERMINAL_MARKS.get(color, "??"), STYLES.get(color, ""))
        self.say(Text.assemble(mark, f"  {place}{row_text(line)}"))

    def _job_error(self, record: logging.LogRecord) -> None:
        job = self.state.running.pop(record.jobid, None)
        name = f"{record.rule_name} {job.key if job and job.key else ''}".strip()
        where = f" (its log: {record.log[0]})" if record.log else ""
        self.say(Text(f"failed  {name}{where}", style="red"))

    def _progress(self, record: logging.LogRecord) -> None:
        self.state.done, self.state.total = record.done, record.total

    def draw(self) -> Table:
        """A line for each job that runs, at most as many as fit, and one for all."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, ratio=1)
        grid.add_column(width=self.bar_width)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        jobs = list(self.state.running.values())
        most = max(1, self.console.height - 4)
        for job in jobs[:most]:
            grid.add_row(*self._job_line(job))
        if len(jobs) > most:
            grid.add_row("", f"and {len(jobs) - most} more", "", "", "")
        done, total, left = self.state.done, self.state.total, self.state.seconds_left()
        rest = f"about {duration(left)} left" if left else ""
        passed = duration(time.monotonic() - self.began)
        bar = ProgressBar(total=max(total, 1), completed=done, width=self.bar_width)
        grid.add_row("[bold]all[/]", f"{done} of {total} jobs", bar, rest, passed)
        return grid

    @property
    def bar_width(self) -> int:
        """Of a job's bar, in characters. A narrow terminal has a short one, since the numbers beside it say the same."""
        return 20 if self.console.width >= 100 else 10

    def _job_line(self, job: Running) -> tuple[str | Text | ProgressBar, ...]:
        told = read_progress(self.folder, job.log) if job.log else None
        room = max(8, min(60, self.console.width - self.bar_width - BESIDE))
        label = Text(printable((job.key or "").rpartition(".")[0], room))
        passed = duration(time.monotonic() - job.began)
        if told is None or not told.total:
            return job.rule, label, "", "", passed
        bar = ProgressBar(total=told.total, completed=told.done, width=self.bar_width)
        return job.rule, label, bar, count_text(told), passed


def count_text(told: Progress) -> str:
    """ "32/96 images"."""
    return f"{told.done}/{told.total} {told.unit}s"


def _rows(plan: Plan) -> Iterator[tuple[str, Row]]:
    """All rows, then each bundle's, each with what its line in the terminal begins with."""
    yield from (("", row) for row in plan.rows)
    yield from ((f"{bundle.name}: ", row) for bundle in plan.bundles for row in bundle.judged)


def row_text(line: Mapping) -> str:
    """A row of the summary in a few words: its verdict, the target before -> after, the neighbor that lost most."""
    text = f"{printable(line['concept'], 40)}: {line['verdict']} ({line['firmness']})"
    if line["presence_base"] is not None:
        text += f"; target {share(line['presence_base'])} -> {share(line['presence_ablated'])}"
    if line["worst_neighbor"]:
        text += f"; worst neighbor {printable(line['worst_neighbor'], 20)} {points(line['worst_neighbor_typical_change'])}"
    return text


_shown: list[tuple[logging.Logger, logging.Handler, TerminalHandler]] = []


def show(plan: Plan, logger: logging.Logger, logs: list[str]) -> None:
    """Show a run of `plan` in the terminal from now on, in the place of Snakemake's lines, if they go to a terminal.

    logger: Snakemake's. logs: the files to which all of its lines go.
    """
    standard = next((handler for handler in logger.handlers if handler.name == STANDARD), None)
    stream = getattr(standard, "stream", None)
    if stream is None or not stream.isatty() or logger.level < logging.INFO:
        return
    console = Console(file=stream)
    if console.is_dumb_terminal:
        return
    folder = os.path.abspath(os.path.join(".snakemake", "progress"))
    try:
        shutil.rmtree(folder, ignore_errors=True)  # a killed run's
        os.makedirs(folder)
    except OSError:
        return
    os.environ[VARIABLE] = folder
    handler = TerminalHandler(plan, console, folder)
    for file in logs:
        handler.say(Text(f"Everything that Snakemake says: {file}"))
    logger.removeHandler(standard)
    logger.addHandler(handler)
    _shown.append((logger, standard, handler))
    handler.live.start()


@atexit.register
def end() -> None:
    """End what `show` began: Snakemake's lines come again."""
    while _shown:
        logger, standard, handler = _shown.pop()
        handler.live.stop()
        logger.removeHandler(handler)
        logger.addHandler(standard)
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(handler.folder, ignore_errors=True)
