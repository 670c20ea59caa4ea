"""What a run that failed or was ended still gives: the report of the rows that are finished, with what failed and why.

Its tables and its page are those of any report, without the other rows; the tables name these in their metadata. Only a
whole run leaves the mark `report/complete.json`, which Snakemake asks for: so a report with rows missing is never taken for
up to date.

A job *failed* if it ended by itself, with an error. It *was ended* by a signal, or together with its run; then the signal
is told if the job's log tells it (`runtime.tell_end`). A log that just ends is what SIGKILL leaves: the job *was killed*.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from concept_ablation.common.files import set_aside
from concept_ablation.common.logs import DONE, ENDED
from concept_ablation.plan.graph import Plan, has_content
from concept_ablation.report.formatting import printable

FAILED, STOPPED, KILLED = "failed", "was ended", "was killed"
CRASH = "Fatal Python error: "  # what a crash of native code leaves
TAIL = 12  # lines of a failed job's log that are shown
WIDTH = 400  # characters of such a line


@dataclass(frozen=True)
class Failure:
    """One job that left no result: its `stage` and `key`, the names of the rows that wait for it, its log and that one's end.

    how: FAILED, KILLED, or STOPPED, where it is known with the signal ("was ended by SIGTERM").
    """

    stage: str
    key: str
    concepts: tuple[str, ...]
    log: str
    lines: tuple[str, ...]
    how: str = FAILED


def find_failures(
    plan: Plan, jobs: Iterable[tuple[str, str | None, str]], stopped: bool = False, since: float | None = None
) -> list[Failure]:
    """The `jobs` that left no result, with the rows that each one stops; first those that failed.

    jobs: each a stage, its key (None: the report's) and its log. stopped: whether the run itself was ended from outside.
    since: when the run began, in seconds since the epoch; an older log is an earlier run's and counts as none.
    """
    waiting: dict[str, list[str]] = {}
    for row in plan.unfinished():
        for key in plan.needed(row):
            waiting.setdefault(key, []).append(row.concept.name)
    rows = {key for row in plan.rows for key in plan.needed(row)} if plan.bundles else set()
    for bundle in plan.bundles:
        for key in {key for end in bundle.ends for key in plan.needed(end)} - rows:
            waiting.setdefault(key, []).append(f"bundle {bundle.name}")
    found = []
    for stage, key, path in sorted(jobs, key=lambda job: (job[0], job[1] or "")):
        how, lines = read_end(path, stopped, since)
        if not (stopped and (how == DONE or (key and has_content(plan.path(key))))):
            how = FAILED if how == DONE else how
            found.append(Failure(stage, key or "", tuple(waiting.get(key, ())), path, lines, how))
    return sorted(found, key=lambda failure: failure.how != FAILED)


def set_empty_aside(plan: Plan) -> list[str]:
    """Set the empty files of unfinished rows aside, which Snakemake would take for results; returns their paths."""
    keys = {key for row in plan.pending for key in plan.needed(row)}
    for bundle in plan.pending_bundles:
        keys |= {key for end in bundle.ends for key in plan.needed(end)}
    files = {plan.path(key) for key in keys} | {plan.training_record(row) for row in plan.pending} - {None}
    empty = sorted(file for file in files if os.path.exists(file) and not has_content(file))
    for file in empty:
        set_aside(file)
    return empty


def read_end(path: str | Path, stopped: bool, since: float | None = None) -> tuple[str, tuple[str, ...]]:
    """How a job ended, as `how_ended`, and what to show of its log. `stopped`, `since`: as for `find_failures`."""
    try:
        lines = log_lines(path) if since is None or os.stat(path).st_mtime >= since else None
    except OSError:
        lines = None
    if lines is None:
        how = STOPPED if stopped else FAILED
        return how, () if stopped else ("it wrote no log: it failed, or was ended, before it began",)
    how, notes = how_ended(lines), []
    if how == DONE and not stopped:
        notes = ["its script went well: what Snakemake made of its files did not, see above"]
    if how == KILLED and not stopped:
        notes = ["its log just ends, as after SIGKILL: often the machine's memory was full"]
    if how == KILLED and stopped:
        how = STOPPED
    shown = lines[-TAIL:] if how in (FAILED, DONE) else lines[-2:-1] if " by " in how else lines[-1:]
    crash = [place for place, line in enumerate(lines) if line.startswith(CRASH)]
    shown = lines[crash[-1] :][:TAIL] if crash else shown
    return how, tuple(notes + [printable(line, WIDTH) for line in shown])


def how_ended(lines: Sequence[str]) -> str:
    """How a job without a result ended, by the lines of its log: FAILED, KILLED, "was ended by SIGNAL", or `logs.DONE`."""
    if any(" CRITICAL " in line or line.startswith(CRASH) for line in lines):
        return FAILED
    last = lines[-1] if lines else ""
    if found := re.search(f" ERROR .*: {ENDED} (SIG[A-Z]+)$", last):
        return f"{STOPPED} by {found[1]}"
    return DONE if last.endswith(f": {DONE}") else KILLED


def log_lines(path: str | Path) -> list[str]:
    """The lines that hold something of a log's last 64 KiB. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
        return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def report_unfinished(plan: Plan, failures: Sequence[Failure], file: TextIO | None = None) -> list[Failure]:
    """Makes the tables and the page of the rows that are finished, and prints how these came out, as `print_summary`.

    A row is shown as soon as it is judged, also if its model isn't measured on other rows' subjects yet.

    A row whose files are damaged joins the failures, which are returned; such a file is set aside, to be made anew.
    """
    from concept_ablation.report.console import print_summary

    folder, failures = Path(plan.results) / "report", list(failures)
    while True:
        missing = {row.concept.name for row in plan.unfinished(judged=True)}
        spec = json.loads(plan.report_spec([row for row in plan.rows if row.concept.name not in missing]))
        spec["rows"] = [_without_unmeasured(row) for row in spec["rows"]]
        told = {name for failure in failures for name in failure.concepts}
        spec["failures"] = [asdict(failure) for failure in failures]
        spec["missing"], spec["waiting"] = sorted(missing), sorted(missing - told)
        (folder / "complete.json").unlink(missing_ok=True)  # first, since all that follows may be interrupted
        try:
            tables = _make_report(plan, spec, folder)
        except ValueError as error:
            path = getattr(error, "damaged", None)
            if path is None or not path.exists():  # a damaged file once set aside is no longer there
                raise
            failures.append(_damage(plan, path, error))
            continue
        print_summary(folder / "summary.parquet", folder / "index.html", file, **tables)
        return failures


def _make_report(plan: Plan, spec: Mapping, folder: Path) -> dict[str, Path | None]:
    """Make the tables and the page of a report's spec; returns what `print_summary` reads beside the summary."""
    from concept_ablation.report.attacks import aggregate_attacks
    from concept_ablation.report.bundles import aggregate_bundles
    from concept_ablation.report.columns import write_columns
    from concept_ablation.report.costs import aggregate_costs, row_costs
    from concept_ablation.report.images import aggregate_images
    from concept_ablation.report.interference import aggregate_interference
    from concept_ablation.report.page import render
    from concept_ablation.report.tables import aggregate_scores

    scores, summary, costs = (folder / f"{name}.parquet" for name in ("scores", "summary", "costs"))
    harm = folder / "interference.parquet" if plan.measures_interference else None
    if harm:
        aggregate_interference(spec, harm)
    attacks = folder / "attacks.parquet" if plan.attacks_rows else None
    if attacks:
        aggregate_attacks(spec, attacks)
    spent = row_costs(aggregate_costs(spec, plan.results, costs))
    aggregate_scores(spec, scores, summary, harm, spent, attacks)
    aggregate_images(spec, folder / "images.parquet")
    write_columns(folder / "columns.json")
    (folder / "complete.json").unlink(missing_ok=True)  # another checkout's, whose tables are no longer there
    bundles = folder / "bundles.parquet" if spec.get("bundles") else None
    if bundles:
        aggregate_bundles(spec, summary, bundles)
    tables = {"bundles_path": bundles, "interference_path": harm, "attacks_path": attacks}
    render(spec, scores, summary, folder / "index.html", costs_path=costs, **tables)
    return tables


def _without_unmeasured(row: Mapping) -> dict:
    """A row of a report's spec, without what isn't measured yet on other rows' subjects, and without attacks that aren't finished."""
    found = dict(row)
    if not all(
        has_content(found["interference"][name]) for name in ("scores", "images") if "interference" in found
    ):
        del found["interference"]
    found["attacks"] = [files for files in row.get("attacks", ()) if all(map(has_content, files.values()))]
    return found


def _damage(plan: Plan, path: Path, error: ValueError) -> Failure:
    """The failure that a damaged file is; it is set aside."""
    names = tuple(row.concept.name for row in plan.rows if str(path) in plan.files(row))
    aside = set_aside(path)
    return Failure(path.parent.name, path.stem, names, str(aside), (str(error),))


def failure_text(failures: Sequence[Failure], most: int = 10) -> str:
    """What failed or was ended, for a terminal: each job with the rows that it stops and its log's end, `most` at most."""
    text = []
    for failure in failures[:most]:
        rows = ", ".join(failure.concepts[:5]) + (
            f" and {len(failure.concepts) - 5} more" if len(failure.concepts) > 5 else ""
        )
        text += [
            f"{failure.stage} {failure.how}" + (f", for {rows}" if rows else "") + f" (log: {failure.log})",
            *(f"    {line}" for line in failure.lines),
        ]
    if len(failures) > most:
        text.append(f"... and {len(failures) - most} more")
    return "\n".join(text)
