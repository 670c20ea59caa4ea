"""What a results folder holds that no row refers to: listed by stage, and removed when asked.

Only names of this pipeline's own form are looked at: in the stages' folders, entries whose name begins with a key; and what
jobs leave that were killed or found damage, `.NAME.PID.part` and `NAME.damaged`. All else in the folder stays, whatever it is.
Links are never followed and never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from concept_ablation.common.errors import UserError
from concept_ablation.common.text import size_text
from concept_ablation.plan.graph import Plan
from concept_ablation.registries import STAGES

KEY = re.compile(r"\.?([A-Za-z0-9-]+\.[0-9a-f]{12})(?:\..*)?")


LEFT = re.compile(r"\..+\.\d+\.part|.+\.damaged")


DAY = 24 * 3600


FRESH = 600
"""Seconds: what changed within them may be another run's work, and stays."""


class CleanupError(UserError):
    """Nothing can be removed now; the message says why and what to do."""


@dataclass(frozen=True)
class Waste:
    """A file or folder that no row refers to: its stage (`logs` and `benchmarks` are others), path and size in bytes."""

    stage: str
    path: Path
    size: int


def collect(plans: Sequence[Plan], now: float | None = None) -> list[Waste]:
    """What none of the plans needs in their results folder, by stage and path. `now`: seconds since the epoch.

    What is left of killed jobs counts when it is older than a day; all else when nothing in it changed for 10 minutes.
    Raises CleanupError if the plans have different results folders.
    """
    folders = {Path(plan.results).resolve(): None for plan in plans}
    if len(folders) > 1:
        raise CleanupError(
            f"the tables write to different folders ({', '.join(map(str, folders))}); name those of one"
        )
    results, now = Path(plans[0].results), time.time() if now is None else now
    needed = {key for plan in plans for key in plan.stages}
    unknown = {slug for plan in plans for slug in plan.unknown}
    found = []
    for stage, entry in _entries(results):
        key, left = KEY.fullmatch(entry.name), LEFT.fullmatch(entry.name)
        unneeded = key and key[1] not in needed and key[1].partition(".")[0] not in unknown
        if not (left or unneeded) or entry.is_symlink():
            continue
        size, changed = measure(entry.path)
        if now - changed >= (DAY if left else FRESH):
            found.append(Waste(stage, Path(entry.path), size))
    whole = {waste.path for waste in found}
    return sorted(
        (waste for waste in found if waste.path.parent not in whole),
        key=lambda waste: (waste.stage, waste.path),
    )


def remove(waste: Sequence[Waste], plans: Sequence[Plan], checkout: str | Path = ".") -> None:
    """Remove what `collect` found for these plans.

    Raises CleanupError while a Snakemake run of `checkout` holds its lock, and where the folder holds nothing that the plans
    need: then they are hardly those that made it.
    """
    if locked_since(checkout) is not None:
        raise CleanupError(
            "a Snakemake run of this checkout holds its lock, so nothing is removed. Wait until it ends; if it was killed, "
            "release the lock: snakemake --unlock"
        )
    if waste and not any(os.path.exists(plan.path(key)) for plan in plans for key in plan.stages):
        raise CleanupError(
            f"{plans[0].results}: holds no work of these tables, so nothing is removed. Name the files that the folder was made "
            "with (--configfile); to empty it, delete it yourself"
        )
    for one in waste:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def locked_since(checkout: str | Path) -> float | None:
    """When the Snakemake run that holds a checkout's lock began, in seconds since the epoch; None if none does."""
    locks = [lock.stat().st_mtime for lock in Path(checkout, ".snakemake", "locks").glob("*.lock")]
    return min(locks, default=None)


def waste_text(waste: Sequence[Waste], removed: bool, most: int = 5) -> str:
    """What was found, or removed, by stage with sizes; `most` names a stage."""
    if not waste:
        return "Nothing to remove: every file belongs to a row"
    lines = []
    for stage in dict.fromkeys(one.stage for one in waste):
        own = [one for one in waste if one.stage == stage]
        lines.append(f"{stage}: {len(own)}, {size_text(sum(one.size for one in own))}")
        lines += [f"    {size_text(one.size):>9}  {one.path}" for one in own[:most]]
        lines += [f"    and {len(own) - most} more (--verbose: all)"] if len(own) > most else []
    total = f"{len(waste)} entries, {size_text(sum(one.size for one in waste))}"
    lines.append(f"Removed {total}" if removed else f"{total} that no row refers to; --remove removes them")
    return "\n".join(lines)


def disk_used(results: str | Path) -> dict[str, int]:
    """Bytes below a results folder, by stage (the folder's own entries, links aside), the largest first."""
    if not Path(results).is_dir():
        return {}
    with os.scandir(results) as entries:
        sizes = {entry.name: measure(entry.path)[0] for entry in entries if not entry.is_symlink()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def measure(path: str | Path) -> tuple[int, float]:
    """Bytes of a file, or of all files below a folder, and the newest modification among them; links aren't followed."""
    own = os.lstat(path)
    size, changed = own.st_size, own.st_mtime
    if stat.S_ISDIR(own.st_mode):
        size = 0
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a run is at work
                    more, later = measure(entry.path)
                    size, changed = size + more, max(changed, later)
    return size, changed


def _entries(results: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """The entries of every folder in which names begin with a key, and of the folders below those, with their stage."""
    stages = list(dict.fromkeys(stage.path.partition("/")[0] for stage in STAGES.values()))
    for stage in (*stages, "checkpoints", "report"):
        for entry in _scan(results / stage):
            yield stage, entry
            if stage == "concepts" and entry.is_dir(follow_symlinks=False):
                yield from ((stage, inner) for inner in _scan(Path(entry.path)) if LEFT.fullmatch(inner.name))
    for group in ("logs", "benchmarks"):
        for rule in _scan(results / group):
            for entry in _scan(Path(rule.path)):
                yield group, entry
                if rule.name == "slurm":  # one level deeper
                    yield from ((group, inner) for inner in _scan(Path(entry.path)))


def _scan(folder: Path) -> list[os.DirEntry]:
    """A folder's entries; none if it is absent or a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)
