"""A warm process whose jobs are small: what tests/test_warm.py starts in place of the real one."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from concept_ablation.common.logs import setup_logging, tell_end
from concept_ablation.jobs.warm import do, serve


def work(job):
    setup_logging(job["log"])
    tell_end(job["log"])
    print("to stdout")
    print("to stderr", file=sys.stderr)
    Path("seen").write_text(f"{os.environ['MARK']} {os.getcwd()} {os.getpid()}")
    if job["then"] == "fail":
        raise ValueError("no such thing")
    if job["then"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job["then"] == "wait":
        time.sleep(600)


if __name__ == "__main__":
    # As in a terminal, whatever started the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    job = serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    if job is not None:
        do(job, work)
