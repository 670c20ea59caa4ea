"""How far a run is, told from its files alone: rows done, running, failed and waiting, the time left, the disk used.

A unit of work is *done* when its file is there. One that isn't is *failed* when the log of its last try has the error that
ended it, and *ended* when that log names a signal at its end, or just ends (as after SIGKILL) and nothing runs any more. It is
*running* when its log was begun after the Snakemake run that holds this checkout's lock, or, where another checkout may be
at work, when its log changed within 10 minutes. All else is *waiting*. A row is in the first of failed, running, ended and
waiting that any of its work is in.
"""

from __future__ import annotations

import contextlib
import csv
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from concept_ablation.common.logs import DONE
from concept_ablation.common.text import size_text
from concept_ablation.plan.cleanup import FRESH, disk_used, locked_since
from concept_ablation.plan.graph import Plan, has_content
from concept_ablation.report.failures import CRASH, FAILED, KILLED, how_ended, log_lines
from concept_ablation.report.formatting import duration, printable

State = Literal["failed", "running", "ended", "waiting"]
WIDTH = 160  # characters of a log's line that are shown


@dataclass(frozen=True)
class Unit:
    """A unit of work that isn't done: its stage, its state, its log, and that one's line that tells most."""

    stage: str
    state: State
    log: Path
    line: str = ""


@dataclass(frozen=True)
class Costs:
    """Seconds of a unit by stage (the median of what was measured in this folder), and how many ran at once."""

    seconds: dict[str, float]
    at_once: float


def status_text(plan: Plan, checkout: str | Path = ".", most: int = 10) -> str:
    """The whole answer, at most `most` rows of each state named."""
    since, now = locked_since(checkout), time.time()
    units = {key: read_unit(plan, key, since, now) for key in unfinished_keys(plan)}
    rows: dict[str, list[str]] = {state: [] for state in get_args(State)}
    for row in plan.pending:
        found = [units[key] for key in plan.needed(row) if key in units]
        state = next((name for name in rows if any(unit.state == name for unit in found)), "waiting")
        told = next((unit for unit in found if unit.state == state and unit.line), None)
        text = f": {told.stage}: {told.line} ({told.log})" if told else ""
        rows[state].append(f"{row.concept.name}{text}")
    counts = ", ".join(f"{len(names)} {state}" for state, names in reversed(rows.items()))
    lines = [f"{plan.results}: {len(plan.rows)} rows: {len(plan.rows) - len(plan.pending)} done, {counts}"]
    for state in ("failed", "ended", "running"):
        lines += [f"{state:>8}  {name}" for name in rows[state][:most]]
        lines += [f"{'':8}  and {len(rows[state]) - most} more"] if len(rows[state]) > most else []
    lines.append(_run_text(since, rows))
    if units:
        lines.append(_time_text(Counter(unit.stage for unit in units.values()), read_costs(plan.results)))
    used = disk_used(plan.results)
    shown = ", ".join(f"{stage} {size_text(size)}" for stage, size in used.items())
    lines.append(f"disk: {size_text(sum(used.values()))}" + (f" ({shown})" if used else ""))
    return "\n".join(lines)


def watch(told: Callable[[], str], pause: float = 5.0) -> str:
    """Show what `told` says on a cleared screen, again and again, until Ctrl-C; returns the last of it.

    pause: seconds between two times; longer where telling takes long, so that it takes a fifth of a core at most.
    """
    text = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            text = told()
            print(f"\033[2J\033[H{text}\n\n{time.strftime('%H:%M:%S')}; Ctrl-C ends this", flush=True)
            time.sleep(max(pause, 4 * (time.monotonic() - began)))
    return text


def unfinished_keys(plan: Plan) -> list[str]:
    """The keys of all work that is still to be done: what unfinished rows lack, and what that is made from if it lacks it."""
    found: dict[str, None] = {}

    def visit(key: str) -> None:
        if key not in found and not has_content(plan.path(key)):
            found[key] = None
            for source in plan.sources(key):
                visit(source)

    for row in plan.pending:
        for key in (row.ablation, row.samples, *row.last, *row.base.values()):
            visit(key)
    for bundle in plan.pending_bundles:
        for key in bundle.ends:
            visit(key)
    return list(found)


def read_unit(plan: Plan, key: str, since: float | None, now: float) -> Unit:
    """How a unit without its file stands. `since`: when the run that goes on began, None if none does; `now`: both in seconds."""
    stage = plan.stages[key]
    log = Path(plan.results, "logs", stage, f"{key}.log")
    try:
        changed = log.stat().st_mtime
        lines = log_lines(log)
    except FileNotFoundError:
        return Unit(stage, "waiting", log)
    if since is not None and changed < since:
        return Unit(stage, "waiting", log)  # an earlier run's; this one tries again
    how, last = how_ended(lines), printable(lines[-1] if lines else "no line yet", WIDTH)
    if how == FAILED:
        errors = [line for line in lines if " CRITICAL " in line or line.startswith(CRASH)]
        return Unit(stage, "failed", log, printable(errors[-1], WIDTH))
    if how not in (KILLED, DONE):
        return Unit(stage, "ended", log, how)
    if since is not None or now - changed < FRESH:
        silent = "" if now - changed < FRESH else f"silent for {duration(now - changed)}, last: "
        return Unit(stage, "running", log, silent + last)
    if how == DONE:  # what it wrote was removed since
        return Unit(stage, "waiting", log)
    return Unit(stage, "ended", log, f"{KILLED}, last: {last}")


def read_costs(results: str | Path) -> Costs:
    """What each stage's units took, from Snakemake's benchmark files of this folder."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for file in Path(results, "benchmarks").glob("*/*.tsv"):
        with file.open(encoding="utf-8", newline="") as opened:
            for line in csv.DictReader(opened, delimiter="\t"):
                try:
                    seconds = float(line["s"])
                except (KeyError, TypeError, ValueError):
                    continue
                end = file.stat().st_mtime
                spans.setdefault(file.parent.name, []).append((end - seconds, end))
    seconds = {
        stage: statistics.median(end - start for start, end in found) for stage, found in spans.items()
    }
    return Costs(seconds, _at_once([span for found in spans.values() for span in found]))


def _at_once(spans: Sequence[tuple[float, float]]) -> float:
    """How many units ran side by side, on average over the time in which any did; 1.0 for none."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(1.0, sum(end - start for start, end in spans) / covered) if covered else 1.0


def _time_text(left: Counter, costs: Costs) -> str:
    known = {stage: count for stage, count in left.items() if stage in costs.seconds}
    unknown = [f"{count} {stage}" for stage, count in left.items() if stage not in costs.seconds]
    parts = [f"{count} {stage} x {duration(costs.seconds[stage])}" for stage, count in known.items()]
    rest = f"; not yet measured: {', '.join(unknown)}" if unknown else ""
    if not known:
        return f"time left: unknown{rest}"
    seconds = sum(count * costs.seconds[stage] for stage, count in known.items()) / costs.at_once
    return (
        f"time left: {'at least ' if unknown else ''}about {duration(seconds)}, an estimate: {', '.join(parts)}, "
        f"{costs.at_once:.1f} at once as so far{rest}"
    )


def _run_text(since: float | None, rows: dict[str, Iterable[str]]) -> str:
    if since is not None:
        return f"A run of this checkout began {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))} and holds its lock"
    return (
        "A run seems to go on in another checkout" if rows["running"] else "No run of this checkout goes on"
    )
