"""List the files in a results folder that no row refers to, by stage, and remove them on request.

Only two forms of names are considered: entries of the stages' folders that begin with a key; and leftovers of jobs
that were killed or found a damaged file, `.NAME.PID.part` and `NAME.damaged`. All other files stay. Links are never
followed or removed.
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


DAY = 24 * 3600  # seconds


FRESH = 600
"""Seconds. A file that changed more recently stays, since another run may be writing it."""


class CleanupError(UserError):
    """Nothing is removed; the message says why and what to do."""


@dataclass(frozen=True)
class Waste:
    """A file or folder that no row refers to: its stage (or `logs`, `benchmarks`), path and size in bytes."""

    stage: str
    path: Path
    size: int


def collect(plans: Sequence[Plan], now: float | None = None) -> list[Waste]:
    """The files in the plans' results folder that none of the plans needs, sorted by stage and path.

    A leftover of a killed job counts if it is older than a day, any other file if nothing in it changed for 10
    minutes. `now`: seconds since the epoch. Raises CleanupError if the plans have different results folders.
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
    """Remove the files that `collect` found for these plans.

    Raises CleanupError while a Snakemake run of `checkout` holds its lock, and if the folder holds nothing that the
    plans need: then it probably belongs to other tables.
    """
    if locked_since(checkout) is not None:
        raise CleanupError(
            "a Snakemake run of this checkout holds its lock, so nothing is removed. Wait until it ends; if it was killed, "
            "release the lock: snakemake --unlock"
        )
    if waste and not any(os.path.exists(plan.path(key)) for plan in plans for key in plan.stages):
        raise CleanupError(
            f"{plans[0].results}: holds no work of these tables, so nothing is removed. Give the config files of the run that "
            "made it (--configfile); to empty the folder, delete it yourself"
        )
    for one in waste:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def locked_since(checkout: str | Path) -> float | None:
    """When the Snakemake run that locks a checkout began, in seconds since the epoch; None if it isn't locked."""
    locks = [lock.stat().st_mtime for lock in Path(checkout, ".snakemake", "locks").glob("*.lock")]
    return min(locks, default=None)


def waste_text(waste: Sequence[Waste], removed: bool, most: int = 5) -> str:
    """The files found or removed, by stage with sizes; at most `most` of them are named per stage."""
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
    """Bytes below each entry of a results folder, the largest first. Links are left out."""
    if not Path(results).is_dir():
        return {}
    with os.scandir(results) as entries:
        sizes = {entry.name: measure(entry.path)[0] for entry in entries if not entry.is_symlink()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def measure(path: str | Path) -> tuple[int, float]:
    """The bytes of a file, or of all files below a folder, and the newest mtime among them. Links aren't followed."""
    own = os.lstat(path)
    size, changed = own.st_size, own.st_mtime
    if stat.S_ISDIR(own.st_mode):
        size = 0
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a running job removed it
                    more, later = measure(entry.path)
                    size, changed = size + more, max(changed, later)
    return size, changed


def _entries(results: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """Stage and entry: of all in the folders whose entries begin with a key, and of leftovers one level deeper."""
    files = [path for stage in STAGES.values() for path in stage.files.values()]
    folders = dict.fromkeys(path.partition("/")[0] for path in files)
    for stage in (*folders, "checkpoints", "report"):
        for entry in _scan(results / stage):
            yield stage, entry
            if stage in ("concepts", "bundles", "trained", "repaired") and entry.is_dir(
                follow_symlinks=False
            ):
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
