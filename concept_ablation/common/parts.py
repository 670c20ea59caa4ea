"""The parts of a job's time: start-up, loading, pictures, training, scoring. The job's log tells them at its end.

A second counts to one part only, the innermost that is open. `bench/pipeline.py` adds them up over a run. Wall time is measured, since
the parts of all jobs and what lies between them are to sum to the run's. On a GPU work is awaited where its result is read, which all
parts do at their end.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from concept_ablation.common.files import read_end

PARTS = ("start-up", "loading", "pictures", "training", "scoring", "rest")
MAIN = {
    "search_prompts": "pictures",
    "generate_anchors": "pictures",
    "ablate_concept": "training",
    "merge_deltas": "training",
    "train_bundle": "training",
    "repair_bundle": "training",
    "sample_base": "pictures",
    "sample_ablated": "pictures",
    "score_concept": "scoring",
    "score_general": "scoring",
    "measure_interference": "scoring",
    "probe_wordings": "scoring",
    "attack_concept": "training",
}
"""Stage -> the part that its time counts to where no other is open. A stage that isn't listed has `rest`."""

_TOLD = re.compile(r": spent ([\d.]+) s: (.*)$", re.MULTILINE)


class _Clock:
    """Seconds by part, and which parts are open, the innermost last."""

    def __init__(self) -> None:
        self.seconds, self.open = dict.fromkeys(PARTS, 0.0), ["rest"]
        self.since = time.perf_counter()

    def count(self) -> None:
        """Count the time since the last change to the innermost part."""
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now


_clock = _Clock()


def begin() -> None:
    """A job begins: nothing is spent yet."""
    global _clock
    _clock = _Clock()


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Inside, time counts to the part `name`, one of `PARTS`; also a decorator, but not of a generator function."""
    clock = _clock
    clock.count()
    clock.open.append(name)
    try:
        yield
    finally:
        clock.count()
        clock.open.pop()


def spent_text() -> str:
    """What the job has spent so far, for the end of its log."""
    _clock.count()
    seconds = _clock.seconds
    told = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return f"spent {sum(seconds.values()):.2f} s: {told}"


def read_spent(path: str | Path) -> dict[str, float] | None:
    """Seconds by part that a finished job's log tells; None if it doesn't or isn't there."""
    found = _TOLD.findall(read_end(path))
    if not found:
        return None
    words = (text.rpartition(" ") for text in found[-1][1].split(", "))
    return {name: float(value) for name, _, value in words}
