"""Where and how work runs: device, precision, memory, files that are whole or absent, logs.

torch is imported inside the functions that need it: a script that only moves files starts in a fraction of a
second.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import logging
import os
import platform
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from concept_ablation.amx import avoid_hidden_tiles

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

log = logging.getLogger(__name__)
CURE = "; delete it and run again"  # of a damaged file, where nobody sets it aside
ENDED, DONE = "ended by", "the script is done"  # how a job's log ends, see `tell_end`
Precision = Literal["auto", "fp32", "bf16", "fp16"]
avoid_hidden_tiles()  # here, since oneDNN reads its variable once, at the first product


class DeviceError(ValueError):
    """A device or a precision that isn't there; the message says what is allowed."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is cuda, then mps, then cpu. Raises DeviceError if it isn't there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in there if there[kind]) if name == "auto" else name.partition(":")[0]
    if not there.get(kind):
        usable = ", ".join(["auto", *(kind for kind in there if there[kind])])
        raise DeviceError(f"device {name!r} is not available here (allowed: {usable})")
    return torch.device(kind if name == "auto" else name)


def resolve_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on `device`; other names pass if the device can do them.

    bf16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX), else fp16 on
    CUDA, else fp32. Only ever a precision of computation (autocast): weights stay fp32. Raises DeviceError.
    """
    if name not in get_args(Precision):
        raise DeviceError(f"precision {name!r} is unknown (allowed: {', '.join(get_args(Precision))})")
    if name == "fp16" and device.type != "cuda":
        raise DeviceError(
            f"precision 'fp16' needs a CUDA device, not {device.type!r} (allowed: auto, fp32, bf16)"
        )
    if name != "auto":
        return name
    if device.type == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a model computes in `precision` on `device`, its weights left as they are."""
    import torch

    resolved = resolve_precision(precision, device)
    if resolved == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if resolved == "bf16" else torch.float16)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of this process's CUDA tensors, on other devices of the process itself."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: moved to `path` at the end, removed if the block fails.

    So `path` is either the whole new file or as it was before, also after a power cut. Folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def damaged(kind: type[ValueError], path: str | Path, why: str) -> ValueError:
    """An error of `kind` that says `why` the file at `path` is no good; its attribute `damaged` is that path."""
    error = kind(f"{path}: {why}{CURE}")
    error.damaged = Path(path)
    return error


def set_aside(path: str | Path) -> Path:
    """Rename a damaged file to `NAME.damaged` beside it, so that it is missing and the next run makes it anew."""
    aside = Path(f"{path}.damaged")
    with contextlib.suppress(FileNotFoundError):  # another job was quicker
        os.replace(path, aside)
    return aside


def progress_bar(*arguments, **settings) -> tqdm:
    """A tqdm bar; in a log file, where nobody watches it move, a line every half minute instead of ten a second."""
    from tqdm import tqdm

    return tqdm(*arguments, mininterval=0.1 if sys.stderr.isatty() else 30, **settings)


def setup_logging(
    log_path: str | Path | None = None, level: int = logging.INFO, results: str | Path | None = None
) -> None:
    """Send log records, Python warnings and the traceback of a crash to stderr and to `log_path`.

    Called once by each script; the first record tells where that runs. Progress bars of libraries are switched off; ours
    write to stderr only. Of an error that this package raises, a mistake of a user's most likely, stderr gets the message
    alone, the log the traceback too. A file of the folder `results` that made the script crash because it is damaged is set
    aside.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].addFilter(lambda record: not getattr(record, "log_only", False))
    if log_path is not None:
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_path, mode="w", encoding="utf-8"))
    # Others from warnings on: open_clip, for one, tells its every step on the root logger.
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
    """See to it that a job's log says at its end how the job ended, whatever ended it, SIGKILL alone excepted.

    After an error that is the error, after a crash of native code its signal and where Python was ("Fatal Python error"),
    after SIGINT, SIGTERM and SIGHUP `ENDED` with the signal, else `DONE`. For the main thread of a script, after
    `setup_logging`.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _interrupt)
    faulthandler.enable(open(log_path, "a", encoding="utf-8"))  # noqa: SIM115, open until the process ends
    atexit.register(_log_done)


def _interrupt(number: int, frame: object) -> None:
    """A signal as SIGINT's: what is open is closed, temporary files are removed, the log tells. A second one kills."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _log_done() -> None:
    log.info(DONE)


def _where() -> str:
    """The machine, under SLURM also the job, and the devices that this process may see."""
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
        message = message.replace(CURE, f"; it is set aside, as {aside}: run again, and it is made anew")
    ours = kind.__module__.startswith(f"{__package__}.")
    log.error("where it happened", exc_info=(kind, error, trace), extra={"log_only": ours})
    log.critical("%s", message)
