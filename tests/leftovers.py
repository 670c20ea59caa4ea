"""Processes that tests have started and that still run."""

import contextlib
from pathlib import Path

import psutil


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that work below `folder`, or name it in their command line or environment; not this one, nor its parents."""
    spared = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if process.pid not in spared and any(str(folder) in word for word in words):
                found.append(process)
    return found


def end(processes: list[psutil.Process]) -> list[str]:
    """Kill these processes; returns the command lines of those that were still there."""
    killed = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline()) or process.name()
            process.kill()
            killed.append(line)
    psutil.wait_procs(processes, timeout=60)
    return killed
