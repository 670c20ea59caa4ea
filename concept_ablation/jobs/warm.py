"""Jobs that start warm: one process of a run imports torch, and every job is a fork of it.

Importing torch, diffusers and transformers takes 6 to 8 CPU seconds, a neighbor's 16 pictures take 3 to 5. So a run on CPUs starts one
process that imports them once (`start`). A job's script hands its work to it (`hand_over`) and waits. There

    the warm process    only imports, accepts and forks: it never computes, so it has no threads that a fork would lose
    a keeper, a job     passes the script's signals on, tells how the work ended, and ends it when the script is gone
    a worker, a job     does the work with the script's environment, folder, stdout and stderr, as the script would have

The script ends as the worker ended: with its exit code, or by its signal. A job that finds no warm process that suits it does its work
itself. The warm process ends with the Snakemake process that started it. Its socket has no file (Linux's abstract names), and it serves
processes of the same user only. GPUs are left out: CUDA can't be forked, and a job on one is long beside its start.

Snakemake's benchmark of such a job has the right seconds, but the script's own memory and CPU time, next to nothing: those of the work
stand at the end of the job's log.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from concept_ablation.common.amx import avoid_hidden_tiles
from concept_ablation.common.gpu_locks import visible_devices
from concept_ablation.registries import FAMILIES, STAGES, load

VARIABLE = "CONCEPT_ABLATION_WARM"  # the socket's name, in the environment of a run's jobs
THREADS = "OMP_NUM_THREADS"  # read by torch when it is imported, so a job must agree on it
LINE = 2**16  # longest greeting or answer, in bytes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_started: list[subprocess.Popen] = []


def serves(device: str) -> bool:
    """Whether jobs on `device` (auto, cpu, ...) can start warm here: on Linux, and on CPUs."""
    if sys.platform != "linux" or device not in ("auto", "cpu"):
        return False
    return device == "cpu" or not visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))


def start(threads: int, log: str | Path, module: str = __name__) -> None:
    """Start the warm process and name it in this process' environment, so that the jobs find it.

    Args:
        threads: CPU threads a job, as Snakemake gives them to its jobs.
        log: file for what the warm process itself says; of that there is nothing unless it fails.
        module: what the process runs.
    """
    name = f"concept-ablation-{secrets.token_hex(8)}"
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        THREADS: str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "PYTHONPATH": path,
    }
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, open(log, "wb") as said:
        listener.bind(f"\0{name}")
        listener.listen(1024)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(listener.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C reaches the scripts, which pass it on
        )
    os.environ[VARIABLE] = name
    _started.append(process)


def stop() -> None:
    """End what `start` has started here. Jobs that run go on."""
    os.environ.pop(VARIABLE, None)
    while _started:
        process = _started.pop()
        process.terminate()
        process.wait()


def hand_over(job: Mapping) -> int | None:
    """Have `job` done by a fork of the warm process: its exit code, or None if no warm process takes it.

    If the worker was ended by a signal, so is this process. SIGINT, SIGTERM and SIGHUP are passed on to the worker; if this process is
    killed, it is, too. Call it in the main thread.
    """
    connection = _connect(os.environ.get(VARIABLE))
    if connection is None:
        return None
    with connection:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: _send(connection, bytes([number])))
        order = {"job": job, "environment": dict(os.environ), "folder": os.getcwd()}
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            socket.send_fds(connection, [b"\n"], [1, 2])
            connection.sendall(json.dumps(order).encode() + b"\n")
            answer = connection.recv(LINE)
        except OSError:
            answer = b""
    code = int(answer or 1)  # no answer: the keeper is gone, and the worker with it
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _connect(name: str | None) -> socket.socket | None:
    """A connection to the warm process, once it has imported all; None if there is none that suits this process."""
    if not name:
        return None
    connection, before = socket.socket(socket.AF_UNIX), signal.getsignal(signal.SIGINT)
    try:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a script that waits, without a traceback
        connection.connect(f"\0{name}")
        if _is_ours(connection) and connection.recv(LINE) == _greeting():
            return connection
    except OSError:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
    connection.close()
    return None


def serve(listener: socket.socket, parent: int) -> Mapping | None:
    """Fork a worker for each job that comes. Returns the job in its worker; None in the warm process, when its parent is gone."""
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        return _keep(connection)
    return None


def _keep(connection: socket.socket) -> Mapping:
    """In a keeper: take the job, fork its worker and see to it. Returns the job, in the worker."""
    with contextlib.suppress(OSError, ValueError):
        connection.settimeout(None)
        if _is_ours(connection):
            connection.sendall(_greeting())
            _, files, _, _ = socket.recv_fds(connection, 1, 2)
            sent = connection.makefile("rb")
            order = json.loads(sent.readline())
            worker = os.fork()
            if not worker:
                connection.detach()
                sent.close()
                return _become(order, files)
            threading.Thread(target=_pass_on, args=(sent, worker), daemon=True).start()
            _, status = os.waitpid(worker, 0)
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _pass_on(sent, worker: int) -> None:
    """Send the worker the signals that the script gets. When the script is gone, end it."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        while number := sent.read(1):
            os.kill(worker, number[0])
        os.kill(worker, signal.SIGKILL)


def _become(order: Mapping, files: list[int]) -> Mapping:
    """Make this process the job's: it ends with its keeper, and has the script's environment, folder, stdout and stderr."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for place, file in enumerate(files, 1):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    return order["job"]


def _greeting() -> bytes:
    """What a script and the warm process must agree on: the installation, and the threads that torch was imported for."""
    return json.dumps([sys.prefix, os.environ.get(THREADS)]).encode()


def _is_ours(connection: socket.socket) -> bool:
    size = struct.calcsize("3i")  # the other end's process, user and group
    return (
        struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]
        == os.getuid()
    )


def _send(connection: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(text)


def _import_all() -> None:
    """Import what the stages need, and what loading a model imports later on."""
    avoid_hidden_tiles()
    for stage in STAGES.values():
        load(stage.function)
    import diffusers
    import open_clip  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    for family in FAMILIES:
        getattr(diffusers, family)


def do(job: Mapping, run: Callable[[Mapping], None]) -> NoReturn:
    """In a worker: do the job and end as a script would, but at once: tearing down what is imported takes 2 s."""
    code = 0
    try:
        run(job)
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """The warm process, and each of its workers."""
    from concept_ablation.jobs.job import run

    listener, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _import_all()
    gc.collect()
    gc.freeze()  # collections leave alone what is imported, and its memory stays shared
    job = serve(listener, parent)
    if job is not None:
        do(job, run)


if __name__ == "__main__":
    main()
