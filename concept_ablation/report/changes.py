"""What changed since an earlier report: its `summary.parquet` beside this one's lines, row by row."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.report.triage import State, state_of

MOVED = 0.05
"""A share that moved by more than this is named even where the verdict stayed."""

NEEDED = ("concept", "kind", "target", "anchor", "verdict", "firmness", "presence_ablated")


class ChangesError(UserError):
    """The earlier summary is missing or not one; the message names it."""


class Change(NamedTuple):
    """One row then and now: its states, and the columns of both summaries."""

    group: str
    before: State
    after: State
    then: Mapping
    line: Mapping


class Changes(NamedTuple):
    """path, made: the earlier summary and when it was written. rows: what changed, by group, in the order of GROUPS.

    added, gone: concepts that only one of both has, or that mean another target now; same: how many rows stayed as they were.
    """

    path: str
    made: datetime
    rows: dict[str, list[Change]]
    added: list[str]
    gone: list[str]
    same: int

    @property
    def text(self) -> str:
        """In one line, without a full stop."""
        parts = [f"{len(found)} {group}" for group, found in self.rows.items()]
        parts += [
            f"{len(names)} {word}" for word, names in (("new", self.added), ("gone", self.gone)) if names
        ]
        return ", ".join([*parts, f"{self.same} as before"])


GROUPS = ("newly failing", "newly fine", "with another verdict", "with other values")


def read_changes(path: str | Path | None, lines: Sequence[Mapping]) -> Changes | None:
    """The summary at `path` beside the lines of this report's; None without a path.

    Raises ChangesError if it isn't there or is no summary.
    """
    if not path:
        return None
    try:
        earlier = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise ChangesError(
            f"{path}: there is no such file (report.earlier names a summary.parquet of an earlier run, or nothing)"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise ChangesError(f"{path}: can't be read as a summary.parquet ({error})") from error
    if missing := [name for name in NEEDED if earlier and name not in earlier[0]]:
        raise ChangesError(f"{path}: no summary of a report, it has no column {', '.join(missing)}")
    then = {_identity(line): line for line in earlier}
    found: dict[str, list[Change]] = {group: [] for group in GROUPS}
    shared = [(then[_identity(line)], line) for line in lines if _identity(line) in then]
    for old, line in shared:
        if group := _group(old, line):
            found[group].append(Change(group, state_of(old), state_of(line), old, line))
    now = {_identity(line) for line in lines}
    return Changes(
        str(path),
        datetime.fromtimestamp(Path(path).stat().st_mtime, UTC),
        {group: changed for group, changed in found.items() if changed},
        [line["concept"] for line in lines if _identity(line) not in then],
        [line["concept"] for line in earlier if _identity(line) not in now],
        len(shared) - sum(map(len, found.values())),
    )


def _identity(line: Mapping) -> tuple:
    return tuple(line[name] for name in ("concept", "kind", "target", "anchor"))


def _group(then: Mapping, line: Mapping) -> str | None:
    """What became of a row; None: nothing to name."""
    before, after = state_of(then), state_of(line)
    if (before == "failed") != (after == "failed"):
        return "newly failing" if after == "failed" else "newly fine"
    if (then["verdict"], then["firmness"]) != (line["verdict"], line["firmness"]):
        return "with another verdict"
    columns = ("presence_ablated", "neighbor_recognition_change", "worst_neighbor_typical_change", "anchor_typical_change")  # fmt: skip
    pairs = [(then.get(name), line.get(name)) for name in columns]
    moved = any(None not in pair and abs(pair[0] - pair[1]) > MOVED for pair in pairs)
    return "with other values" if moved else None
