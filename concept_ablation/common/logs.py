"""A job's log: where records go, how a crash is reported, how the job's end is recorded."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import logging
import os
import platform
import re
import signal
import sys
import time
import warnings
from pathlib import Path

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import CURE, read_end, set_aside
from concept_ablation.common.hardware import peak_resident
from concept_ablation.common.parts import spent_text
from concept_ablation.common.progress import tell_progress_of

log = logging.getLogger(__name__)


ENDED, DONE = "ended by", "the script is done"  # the last line of a job's log, see `tell_end`
TOOK = "took %.1f CPU s, and %.0f MB of memory at most"  # the line before `DONE`
_TOOK = re.compile(r": took ([\d.]+) CPU s, and (\d+) MB of memory at most$", re.MULTILINE)


def setup_logging(
    log_path: str | Path | None = None, level: int = logging.INFO, results: str | Path | None = None
) -> None:
    """Send log records, Python warnings and the traceback of a crash to stderr and to `log_path`.

    Each script calls it once; the first record names the machine. Progress bars of libraries are switched off; those of
    this package go to stderr only. A `UserError` goes to stderr as its message alone, and to the log with its traceback.
    Nothing goes to stderr where the run itself shows its jobs, see `progress`. If the script crashes because a file of the
    folder `results` is damaged, that file is set aside.
    """
    handlers: list[logging.Handler] = []
    if log_path is None or not tell_progress_of(log_path):
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[0].addFilter(lambda record: not getattr(record, "log_only", False))
    if log_path is not None:
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_path, mode="w", encoding="utf-8"))
    # Other packages from warnings on: open_clip, for one, logs its every step on the root logger.
    logging.basicConfig(
        level=logging.WARNING,
        handlers=handlers,
        force=True,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("concept_ablation").setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.excepthook = functools.partial(_log_crash, results)
    log.info(_where())


def tell_end(log_path: str | Path) -> None:
    """Make a job's log end with how the job ended, whatever ended it except SIGKILL.

    The log ends with the error; after a crash of native code with its signal and where Python was ("Fatal Python
    error"); after SIGINT, SIGTERM and SIGHUP with `ENDED` and the signal; else with `DONE`. Call it in the script's
    main thread, after `setup_logging`.
    """
    raise_signals()
    faulthandler.enable(open(log_path, "a", encoding="utf-8"))  # noqa: SIM115, open until the process ends
    atexit.register(_log_done)


def raise_signals() -> None:
    """From now on SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does. To be called again does nothing."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup SIGHUP stays ignored
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    """Treat a signal like SIGINT: files are closed, temporary ones removed, the log says so. A second one kills."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _log_done() -> None:
    log.info("%s", spent_text())
    log.info(TOOK, time.process_time(), peak_resident() / 1e6)
    log.info(DONE)


def read_took(path: str | Path) -> tuple[float, float] | None:
    """CPU seconds and the most resident memory (MB) that a finished job's log tells; None if it doesn't or isn't there."""
    found = _TOOK.findall(read_end(path))
    return (float(found[-1][0]), float(found[-1][1])) if found else None


def _where() -> str:
    """The machine, the SLURM job if there is one, and the devices that this process may see."""
    names = ("SLURMD_NODENAME", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES")
    return " ".join(
        [platform.node(), *(f"{name}={os.environ[name]}" for name in names if name in os.environ)]
    )


def _log_crash(results: str | Path | None, kind, error, trace) -> None:
    message = f"{kind.__name__}: {error}"
    atexit.unregister(_log_done)
    if issubclass(kind, KeyboardInterrupt):
        log.error("%s %s", ENDED, str(error) or "SIGINT")
        return
    path = getattr(error, "damaged", None)
    if path and results and path.resolve().is_relative_to(Path(results).resolve()):
        aside = set_aside(path).name
        message = message.replace(CURE, f"; it is set aside as {aside}: run again, and it is made anew")
    ours = issubclass(kind, UserError)
    log.error("where it happened", exc_info=(kind, error, trace), extra={"log_only": ours})
    log.critical("%s", message)
