"""Which GPU a job works on: on one machine each GPU job claims a device of its own, under a lock.

`snakemake --resources gpu=4` only counts jobs and hands out no device. So each job takes a free one and shows itself
nothing else (CUDA_VISIBLE_DEVICES), before torch is imported: nothing here imports it. The lock is the kernel's (flock)
and ends with the process, however that dies. Under SLURM nothing is claimed: SLURM gives each job its devices.

The lock files are one user's on one machine, whatever the checkout: `/tmp/concept-ablation-gpus-<uid>/<id>.<n>.lock`, or
in the folder that the environment variable CONCEPT_ABLATION_LOCKS names.
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


_held: list[int] = []  # open lock files: closing one would give its device away


class ClaimError(UserError):
    """No lock can be made; the message says why and what to do."""


def claim_device(
    per_device: int = 1,
    *,
    environment: MutableMapping[str, str] = os.environ,
    poll_seconds: float = 1.0,
) -> str | None:
    """Claim one device until this process ends, waiting until one is free; sets CUDA_VISIBLE_DEVICES to it.

    Args:
        per_device: jobs that may share one device, from 1.
        environment: where CUDA_VISIBLE_DEVICES (the devices to choose from), SLURM_JOB_ID and CONCEPT_ABLATION_LOCKS are
            read, and the first is set.
        poll_seconds: between two looks for a free device.

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
        for slot in range(per_device):  # a device of one's own first, a shared one after that
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
    """The devices that a job may choose from: those in `allowed` (CUDA_VISIBLE_DEVICES), without it all of the machine.

    A number is a device as nvidia-smi counts them. Where nvidia-smi answers, devices are named by their UUIDs, so that
    a number and a UUID never mean two locks for one device.
    """
    there = _installed()
    if allowed is None:
        return there
    names = []
    for name in (part.strip() for part in allowed.split(",")):
        if not name or name.startswith("-"):  # as CUDA reads it: what follows is hidden
            break
        full = [there[int(name)]] if name.isdigit() and int(name) < len(there) else []
        full = full or [device for device in there if device.startswith(name) and not name.isdigit()]
        names.append(full[0] if full else name)
    return list(dict.fromkeys(names))


def lock_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """The folder of the lock files, made if need be; only its owner's. Raises ClaimError."""
    # Not the temporary folder of TMPDIR, which can differ between two runs that share the devices.
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
    """The UUIDs of the machine's NVIDIA devices in nvidia-smi's order; numbers where only the driver is there."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("nvidia-smi doesn't answer (%s): counting the driver's devices", error)
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _lock(path: Path) -> bool:
    """Whether this process now holds the lock `path`; it then writes its number into it."""
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
