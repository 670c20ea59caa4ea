"""A real SLURM cluster on this machine for tests, and what can go wrong in one."""

import contextlib
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A SLURM job of a run: `label` is its key without the hash, `memory` as SLURM writes it, times as SLURM writes them."""

    id: str
    rule: str
    key: str
    state: str
    node: str
    start: str = ""
    end: str = ""
    memory: str = ""
    limit: str = ""
    devices: str = ""

    @property
    def label(self) -> str:
        return self.key.partition(".")[0]


class Cluster:
    """The cluster whose state is in `folder`: `start()` first, `stop()` whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *node: str) -> subprocess.CompletedProcess:
        """Start the cluster, or one node again; stdout and stderr go to `start.txt` in the folder."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "start.txt").open("w") as out:
            command = ["timeout", "-k", "10", "300", HERE / "start.sh", self.folder, *node]
            return subprocess.run(command, check=False, stdout=out, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """Stop all that `start` started."""
        subprocess.run(["timeout", "-k", "10", "120", HERE / "stop.sh", self.folder], check=False)

    def running(self) -> list[Job]:
        """The running jobs whose script has begun."""
        begun = {environment.get("SLURM_JOB_ID") for _, environment in _scripts()}
        lines = _ask("squeue", "-h", "-t", "R", "-o", "%A|%k|%T|%N")
        return [job for job in (Job(id, *_unit(unit), *rest) for id, unit, *rest in lines) if job.id in begun]

    def ended(self, runs: list[str]) -> list[Job]:
        """All jobs of these runs, by SLURM's accounting."""
        fields = "JobIDRaw,Comment,State,NodeList,Start,End,ReqMem,Timelimit,AllocTRES"
        lines = _ask("sacct", "-X", "-n", "-P", "-o", fields, "--name", ",".join(runs), "-S", "now-1hour")
        return [Job(id, *_unit(unit), state.split()[0], *rest) for id, unit, state, *rest in lines]

    def cancel(self, job: Job) -> None:
        """End a job as an administrator does."""
        _ask("scancel", job.id)

    def stall(self, job: Job) -> None:
        """Stop a job's script for good, and let SLURM end the job after a minute."""
        for process, environment in _scripts():
            if environment.get("SLURM_JOB_ID") == job.id:
                process.send_signal(signal.SIGSTOP)
        _ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and all its jobs' processes are gone at once."""
        ids = {id for (id,) in _ask("squeue", "-h", "-w", node, "-o", "%A")}
        pid = int((self.folder / "run" / f"slurmd-{node}.pid").read_text().split()[0])
        psutil.Process(pid).kill()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                step = re.match(r"slurmstepd: \[(\d+)\.", " ".join(process.cmdline()))
                if (step and step[1] in ids) or process.environ().get("SLURMD_NODENAME") == node:
                    process.kill()


def _ask(*command: str) -> list[list[str]]:
    """The lines that one of SLURM's commands prints, split at `|`."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return [line.split("|") for line in done.stdout.splitlines()]


def _unit(comment: str) -> tuple[str, str]:
    """The rule and the key that a job's comment names."""
    rule, _, key = comment.removeprefix("rule_").partition("_wildcards_")
    return rule, key


def _scripts():
    """The processes that run a rule's script, each with its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any("/.snakemake/scripts/" in part for part in process.cmdline()[1:2]):
                yield process, process.environ()
