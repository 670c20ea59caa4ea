"""What a run that failed still gives: the report of the rows that are finished, with what failed, where and why.

Its tables and its page are those of any report, without the other rows; the tables name these in their metadata. Only a
whole run leaves the mark `report/complete.json`, which Snakemake asks for: so a report with rows missing is never taken for
up to date.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from concept_ablation.plan import Plan, has_content
from concept_ablation.runtime import set_aside

TAIL = 12  # lines of a failed job's log that are shown
WIDTH = 400  # characters of such a line


@dataclass(frozen=True)
class Failure:
    """One job that failed: its `stage` and `key`, the names of the rows that wait for it, its log and that one's end."""

    stage: str
    key: str
    concepts: tuple[str, ...]
    log: str
    lines: tuple[str, ...]


def find_failures(plan: Plan, failed: Iterable[tuple[str, str | None, str]]) -> list[Failure]:
    """`failed` jobs, each a stage, its key (None: the report's) and its log, with the rows that each one stops."""
    waiting: dict[str, list[str]] = {}
    for row in plan.unfinished():
        for key in plan.needed(row):
            waiting.setdefault(key, []).append(row.concept.name)
    return [
        Failure(stage, key or "", tuple(waiting.get(key, ())), path, tail(path))
        for stage, key, path in sorted(failed, key=lambda job: (job[0], job[1] or ""))
    ]


def set_empty_aside(plan: Plan) -> list[str]:
    """Sets the empty files of unfinished rows aside, since Snakemake takes them for good ones; returns their paths."""
    keys = {key for row in plan.pending for key in plan.needed(row)}
    files = {plan.path(key) for key in keys} | {plan.training_record(row) for row in plan.pending} - {None}
    empty = sorted(file for file in files if os.path.exists(file) and not has_content(file))
    for file in empty:
        set_aside(file)
    return empty


def tail(path: str | Path) -> tuple[str, ...]:
    """The last lines of a log, without what could move a terminal's cursor."""
    try:
        lines = log_lines(path)
    except OSError:
        return ("it wrote no log: it was ended before it began, or by the machine",)
    return tuple(printable(line, WIDTH) for line in lines[-TAIL:]) or (
        "its log is empty: it was ended from outside",
    )


def log_lines(path: str | Path) -> list[str]:
    """The lines that hold something of a log's last 64 KiB. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
        return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def printable(line: str, width: int) -> str:
    """A log's line for a terminal: no control characters, at most `width` characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in line)
    return text if len(text) <= width else text[: width - 3] + "..."


def report_unfinished(plan: Plan, failures: Sequence[Failure], file: TextIO | None = None) -> list[Failure]:
    """Makes the tables and the page of the rows that are finished, and prints how these came out, as `print_summary`.

    A row whose files are damaged joins the failures, which are returned; such a file is set aside, to be made anew.
    """
    from concept_ablation.report import print_summary, render
    from concept_ablation.tables import aggregate_scores

    folder, failures = Path(plan.results) / "report", list(failures)
    names = ("scores.parquet", "summary.parquet", "index.html", "complete.json")
    scores, summary, page, mark = (folder / name for name in names)
    while True:
        missing = {row.concept.name for row in plan.unfinished()}
        spec = json.loads(plan.report_spec([row for row in plan.rows if row.concept.name not in missing]))
        told = {name for failure in failures for name in failure.concepts}
        spec["failures"] = [asdict(failure) for failure in failures]
        spec["missing"], spec["waiting"] = sorted(missing), sorted(missing - told)
        mark.unlink(missing_ok=True)  # first, since all that follows may be interrupted
        try:
            aggregate_scores(spec, scores, summary)
            mark.unlink(missing_ok=True)  # another checkout's, whose tables are no longer there
            render(spec, scores, summary, page)
        except ValueError as error:
            path = getattr(error, "damaged", None)
            if path is None or not path.exists():  # a damaged file once set aside is no longer there
                raise
            failures.append(_damage(plan, path, error))
            continue
        print_summary(summary, page, file)
        return failures


def _damage(plan: Plan, path: Path, error: ValueError) -> Failure:
    """The failure that a damaged file is; it is set aside."""
    names = tuple(row.concept.name for row in plan.rows if str(path) in plan.files(row))
    aside = set_aside(path)
    return Failure(path.parent.name, path.stem, names, str(aside), (str(error),))


def failure_text(failures: Sequence[Failure], most: int = 10) -> str:
    """What failed, for a terminal: each job with the rows that it stops and the end of its log, `most` jobs at most."""
    text = []
    for failure in failures[:most]:
        rows = ", ".join(failure.concepts[:5]) + (
            f" and {len(failure.concepts) - 5} more" if len(failure.concepts) > 5 else ""
        )
        text += [
            f"{failure.stage} failed" + (f", for {rows}" if rows else "") + f" (log: {failure.log})",
            *(f"    {line}" for line in failure.lines),
        ]
    if len(failures) > most:
        text.append(f"... and {len(failures) - most} more")
    return "\n".join(text)
