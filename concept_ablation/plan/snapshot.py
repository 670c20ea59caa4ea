"""A snapshot of a run's plan, for its jobs on other machines.

Such a job reads the workflow again, maybe hours after the run began. If it read the table, the config and the prompt
files again, an edit made meanwhile could remove its own work, and ten thousand rows would be planned ten thousand
times. So the run saves its plan in a file and names the file in an environment variable, which SLURM passes on. Each
job looks up its own work.

The file is an SQLite database, in which a job of a run of 10,000 rows finds its spec in milliseconds. As JSON the
same plan would take each job 1.4 s and 340 MB of memory, and all jobs of the run 15 hours (docs/performance.md).
Nothing here imports torch or pandas.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from concept_ablation.common.files import atomic_output
from concept_ablation.plan.graph import Plan, canonical

VARIABLE = "CONCEPT_ABLATION_PLAN"


class PlanSnapshot(Plan):
    """A run's plan as its jobs read it: every unit's spec and files and the report's spec, but no rows.

    `config`: the run's checked config. Raises OSError if there is no file at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        # No locks, which a network file system may lack: nobody writes to this file any more.
        self._database = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)
        run = json.loads(self._find("select content from run"))
        self.results, self.config = run["results"], run["config"]
        self._report, self._pending_files, self._goals = run["report"], run["pending_files"], run["goals"]
        self._judges_bundles = run["judges_bundles"]
        self._measures_interference = run["measures_interference"]
        self._attacks_rows = run["attacks_rows"]
        self.longer, self.starts = run["longer"], run["starts"]
        self.stages = _Lookup(lambda key: self._find("select stage from units where key = ?", key))
        one = "select spec from units where stage = ? and key = ?"
        self.specs = _Lookup(lambda stage: _Lookup(lambda key: json.loads(self._find(one, stage, key))))

    def _find(self, query: str, *values: str) -> str:
        row = self._database.execute(query, values).fetchone()
        if row is None:
            raise KeyError(values)
        return zlib.decompress(row[0]).decode() if isinstance(row[0], bytes) else row[0]

    @property
    def judges_bundles(self) -> bool:
        return self._judges_bundles

    @property
    def measures_interference(self) -> bool:
        return self._measures_interference

    @property
    def attacks_rows(self) -> bool:
        return self._attacks_rows

    def pending_files(self) -> list[str]:
        return self._pending_files

    def goals(self) -> list[str]:
        return self._goals

    def report_spec(self) -> str:
        return self._report


class _Lookup(dict):
    """A mapping that looks its values up when they are asked for."""

    def __init__(self, find: Callable[[str], object]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: str) -> object:
        return self._find(key)


def save_snapshot(plan: Plan, config: Mapping, folder: str | Path) -> Path:
    """Save `plan` and the checked `config` in a file of `folder`, for the jobs of this process; returns its path."""
    run = {
        "results": plan.results,
        "config": dict(config),
        "report": plan.report_spec(),
        "pending_files": plan.pending_files(),
        "goals": plan.goals(),
        "judges_bundles": plan.judges_bundles,
        "measures_interference": plan.measures_interference,
        "attacks_rows": plan.attacks_rows,
        "longer": plan.longer,
        "starts": plan.starts,
    }
    database = sqlite3.connect(":memory:")
    database.execute("create table run (content blob)")
    database.execute("create table units (key text primary key, stage text, spec blob) without rowid")
    database.execute("insert into run values (?)", (zlib.compress(canonical(run).encode(), 1),))
    database.executemany(
        "insert into units values (?, ?, ?)",
        (
            # Not `canonical`, which sorts keys: their order is that of the unit's input files.
            (key, stage, zlib.compress(json.dumps(spec).encode(), 1))
            for stage, specs in plan.specs.items()
            for key, spec in specs.items()
        ),
    )
    database.commit()
    content = database.serialize()
    path = Path(folder).absolute() / f"{hashlib.sha256(content).hexdigest()[:12]}.sqlite"
    with atomic_output(path) as part:
        part.write_bytes(content)
    os.environ[VARIABLE] = str(path)
    return path


def load_snapshot() -> PlanSnapshot | None:
    """The plan of the run that this job belongs to; None if there is none here, so that the table has to be read."""
    try:
        return PlanSnapshot(os.environ[VARIABLE])
    except (KeyError, OSError):
        return None


def delete_snapshot() -> None:
    """Remove the file that `save_snapshot` wrote. Call it when the run and its jobs have ended."""
    path = os.environ.pop(VARIABLE, None)
    if path:
        Path(path).unlink(missing_ok=True)
