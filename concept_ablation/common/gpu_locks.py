"""Assign GPUs on one machine: each GPU job locks one device and sees no other.

`snakemake --resources gpu=4` only counts jobs; it assigns no devices. So each job locks a free device and sets
CUDA_VISIBLE_DEVICES to it, before torch is imported. Nothing here imports torch. The lock is the kernel's (flock) and
ends with the process, however that ends. Under SLURM nothing is locked, since SLURM assigns the devices.

A user has one set of lock files on a machine, shared by all checkouts:
`/tmp/concept-ablation-gpus-<uid>/<id>.<n>.lock`, or the folder that the environment variable CONCEPT_ABLATION_LOCKS
names.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import MutableMapping
from pathlib import Path

from concept_ablation.common.errors import UserError

log = logging.getLogger(__name__)


_held: list[int] = []  # open lock files: closing one would release its device


class ClaimError(UserError):
    """A lock file can't be made; the message says why and what to do."""


def claim_device(
    per_device: int = 1,
    *,
    environment: MutableMapping[str, str] = os.environ,
    poll_seconds: float = 1.0,
) -> str | None:
    """Wait for a free device, lock it until this process ends, and set CUDA_VISIBLE_DEVICES to it.

    Args:
        per_device: jobs that may share one device, from 1.
        environment: read for CUDA_VISIBLE_DEVICES (the devices to choose from), SLURM_JOB_ID and
        CONCEPT_ABLATION_LOCKS;
            CUDA_VISIBLE_DEVICES is set in it.
        poll_seconds: seconds between two attempts.

    Returns the device, or None where there is none to claim: no GPU, or SLURM. Raises ClaimError.
    """
    if environment.get("SLURM_JOB_ID"):
        return None
    devices = visible_devices(environment.get("CUDA_VISIBLE_DEVICES"))
    if not devices:
        return None
    folder = lock_folder(environment)
    waiting = False
    while True:
        for slot in range(per_device):  # an unused device first, then one to share
            for device in devices:
                if _lock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', device)}.{slot}.lock"):
                    environment["CUDA_VISIBLE_DEVICES"] = device
                    log.info("GPU %s of %s", device, ", ".join(devices))
                    return device
        if not waiting:
            log.info("waiting: all GPUs (%s) are in use by other jobs, see %s", ", ".join(devices), folder)
            waiting = True
        time.sleep(poll_seconds)


def visible_devices(allowed: str | None) -> list[str]:
    """The devices that a job may choose from: those that `allowed` (CUDA_VISIBLE_DEVICES) lists, or all if it is None.

    A number counts in nvidia-smi's order. Where nvidia-smi answers, every device is named by its UUID. So a number
    and a UUID never make two locks for one device.
    """
    there = _installed()
    if allowed is None:
        return there
    names = []
    for name in (part.strip() for part in allowed.split(",")):
        if not name or name.startswith("-"):  # as in CUDA, the devices after it are hidden
            break
        full = [there[int(name)]] if name.isdigit() and int(name) < len(there) else []
        full = full or [device for device in there if device.startswith(name) and not name.isdigit()]
        names.append(full[0] if full else name)
    return list(dict.fromkeys(names))


def lock_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """The folder of the lock files, created if it is missing. It must be this user's own. Raises ClaimError."""
    # Not in TMPDIR: it can differ between two runs that share the devices.
    own = environment.get("CONCEPT_ABLATION_LOCKS")
    folder = Path(own) if own else Path("/tmp") / f"concept-ablation-gpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OSError(errno.EPERM, "it belongs to another user")
    except OSError as error:
        raise ClaimError(
            f"{folder}: the lock files of the GPUs can't be kept here ({error.strerror}). Name another folder, the same for "
            "all runs on this machine, in the environment variable CONCEPT_ABLATION_LOCKS"
        ) from None
    return folder


def _installed() -> list[str]:
    """The UUIDs of the machine's NVIDIA devices in nvidia-smi's order; plain numbers if it is missing or fails."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("nvidia-smi doesn't answer (%s): numbering the driver's device files instead", error)
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _lock(path: Path) -> bool:
    """Try to lock the file `path` without waiting; returns whether it worked. The file then holds this process's id."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ClaimError(f"{path}: can't be opened ({error.strerror}); remove it and run again") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError as error:
        os.close(file)
        raise ClaimError(
            f"{path}: this file system has no locks ({error.strerror}). Name a local folder in the environment variable "
            "CONCEPT_ABLATION_LOCKS"
        ) from None
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    _held.append(file)
    return True
