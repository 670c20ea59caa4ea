"""A real SLURM cluster on this machine for tests, and what can go wrong in one."""

import contextlib
import re
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
            command = ["timeout", "-k", "10", "900", HERE / "start.sh", self.folder, *node]
            return subprocess.run(command, check=False, stdout=out, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """Stop all that `start` started."""
        subprocess.run(["timeout", "-k", "10", "600", HERE / "stop.sh", self.folder], check=False)

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

    def hold(self, job: Job) -> bool:
        """Stop a job's script, so that it can't end before the harm that follows; False if it has ended."""
        held = False
        for process, environment in _scripts():
            with contextlib.suppress(psutil.Error):
                if environment.get("SLURM_JOB_ID") == job.id:
                    process.suspend()
                    held = held or process.is_running()
        return held

    def cancel(self, job: Job) -> None:
        """End a job as an administrator does."""
        _ask("scancel", job.id)

    def end_its_time(self, job: Job) -> None:
        """Let SLURM end a job that has run for a minute."""
        _ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and all its jobs' processes are gone at once."""
        while there := self._processes_of(node):  # what they started meanwhile, too
            for process in there:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(there, timeout=10)
        self._say_down(node)

    def freeze_node(self, node: str) -> list[psutil.Process]:
        """A node that hangs, or that the network has lost: all its processes stop, and SLURM counts its jobs as failed.

        Returns the processes, for `resume_node`.
        """
        there = self._processes_of(node)
        for process in there:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        self._say_down(node)
        return there

    def resume_node(self, node: str, frozen: list[psutil.Process]) -> None:
        """The node comes back, and SLURM ends what it finds there of old jobs: after it at most a minute is waited for."""
        for process in frozen:
            with contextlib.suppress(psutil.Error):
                process.resume()
        psutil.wait_procs([process for process in frozen if not _is_daemon(process)], timeout=60)
        with contextlib.suppress(subprocess.CalledProcessError):  # it is back in service by itself
            _ask("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def _processes_of(self, node: str) -> list[psutil.Process]:
        """A node's daemon, its jobs' processes and the daemons that watch these."""
        ids = {id for (id,) in _ask("squeue", "-h", "-w", node, "-o", "%A")}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                step = re.match(r"slurmstepd: \[(\d+)\.", line)
                daemon = line.startswith(f"slurmd -D -N {node} -f {self.folder}/")
                if daemon or (step and step[1] in ids) or process.environ().get("SLURMD_NODENAME") == node:
                    found.append(process)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    @staticmethod
    def _say_down(node: str) -> None:
        """What SLURM finds out by itself within SlurmdTimeout, which on a busy machine it would also find of live nodes."""
        _ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def _ask(*command: str) -> list[list[str]]:
    """The lines that one of SLURM's commands prints, split at `|`."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return [line.split("|") for line in done.stdout.splitlines()]


def _is_daemon(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == "slurmd"
    return False


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
