"""`snakemake --profile slurm` on a real cluster: what comes out is what a local run gives, whatever happens to its jobs.

Three of the shipped rows with fewer neighbors and small counts, on the embedded model; all on one machine, about 8 minutes on
2 cores (`make slurm-test`). How busy the machine is decides nothing here: time limits only end what hangs, and an attempt that
SLURM itself lost is no attempt of the pipeline's.
"""

import copy
import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.leftovers import end, processes_of
from tests.slurm.cluster import Cluster, Job

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
HEADER = "concept,kind,target,anchor,neighbors,delta\n"
STYLES = "neon,style,neon,picture,ink,\npencil,style,pencil,picture,ink,\n"
OWL = "owl,object,owl,bird,duck,\n"
BROKEN = "broken,object,owl,bird,duck,broken.safetensors\n"
SAMPLER = {"steps": 2, "precision": "fp32"}
SMALL = {
    "prompts": {"count": 4},
    "anchors": {"images": 4, "sampler": SAMPLER},
    "training": {
        "steps": 2,
        "batch_size": 2,
        "precision": "fp32",
        "preserve": "none",
        "strength": "fixed",
    },
    "evaluation": {
        "images": {"target": 4, "anchor": 4, "neighbor": 4},
        "sampler": SAMPLER,
        "interference": "none",  # its jobs are like sample_ablated's, and would add a third
        "wordings": {"images": 0},  # the same
        "statistics": {"bootstrap": 20},
    },
    "runtime": {"device": "cpu"},  # the cluster's GPUs are fakes
}
GPU_RULES = {"generate_anchors", "ablate_concept", "sample_base", "sample_ablated", "score_concept"}
JOBS = {  # of STYLES and OWL: what rows share is made once
    "write_prompts": 2,
    "generate_anchors": 2,
    "ablate_concept": 3,
    "sample_base": 7,
    "sample_ablated": 3,
    "score_concept": 3,
    "aggregate_scores": 1,
    "render_report": 1,
}
# Measured anew each time.
TIMED = {"seconds", "peak_memory_bytes", "training_seconds", "peak_memory_mb", "run"}
COST = "cost_"  # how the summary's columns of what a row cost begin
ATTEMPTS = 1 + yaml.safe_load((ROOT / "slurm" / "config.yaml").read_text())["retries"]
REPORT = {"aggregate_scores", "render_report"}  # made in each run
SAME = ("prompts/*", "anchors/*", "base/*", "samples/*", "scores/*")


def replace(settings: dict, own: dict) -> dict:
    """`settings` with the values of `own`, section by section."""
    for name, value in own.items():
        settings[name] = replace(copy.deepcopy(settings[name]), value) if isinstance(value, dict) else value
    return settings


class Checkout:
    """A user's checkout, its config and its profile edited as a user and a site's admin would."""

    def __init__(self, folder: Path, table: str) -> None:
        self.folder, self.runs = folder, []
        folder.mkdir()
        for name in ("workflow", "profiles", "config", "slurm"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "Snakefile", folder)
        for name in ("concept_ablation", "embedded"):
            (folder / name).symlink_to(ROOT / name)
        self.edit("config/config.yaml", SMALL)
        # Looks come sooner than on a cluster, where jobs take longer.
        self.edit("slurm/config.yaml", {"slurm-init-seconds-before-status-checks": 2, "latency-wait": 5})
        self.write(table)

    def edit(self, file: str, own: dict) -> None:
        path = self.folder / file
        path.write_text(yaml.safe_dump(replace(yaml.safe_load(path.read_text()), own), sort_keys=False))

    def write(self, table: str) -> None:
        (self.folder / "concepts.csv").write_text(HEADER + table)

    def start(self, *arguments: str, seconds: int = 1800) -> subprocess.Popen:
        """Start `snakemake ARGUMENTS` at the checkout's root; what it says goes to run-N.txt."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.runs.append(self.folder / f"run-{len(self.runs)}.txt")
        with self.runs[-1].open("w") as out:
            return subprocess.Popen(
                ["timeout", "-k", "10", str(seconds), "snakemake", *arguments],
                cwd=self.folder,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def snakemake(self, *arguments: str) -> tuple[int, str]:
        """The exit status of `snakemake ARGUMENTS`, and what it says."""
        return self.start(*arguments).wait(), self.said()

    def said(self) -> str:
        return self.runs[-1].read_text()

    def run_names(self) -> list[str]:
        """The names that SLURM knows this checkout's runs by."""
        found = (re.search(r"SLURM run ID: (\S+)", run.read_text()) for run in self.runs)
        return [match[1] for match in found if match]

    def read_table(self, name: str, concepts: set[str]) -> list[dict[str, str]]:
        """The lines of a table of the report that are about `concepts`, without what is measured anew each time."""
        with (self.folder / "results" / "report" / name).open(newline="") as file:
            return [
                {
                    column: value
                    for column, value in row.items()
                    if column not in TIMED and not column.startswith(COST)
                }
                for row in csv.DictReader(file)
                if row["concept"] in concepts
            ]


@pytest.fixture(scope="session")
def folder():
    """A folder of all that these tests write; SLURM_TEST_KEEP=1 keeps it. Not pytest's own, which other runs of it remove."""
    path = Path(tempfile.mkdtemp(prefix="slurm-test-"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated test run cleans up, too
    yield path
    signal.signal(signal.SIGTERM, before)
    left = end(processes_of(path))
    if os.environ.get("SLURM_TEST_KEEP"):
        print(f"\nSee {path}")
    else:
        shutil.rmtree(path)
    # docs/slurm.md tells why the Snakemake of a job that SLURM ended can stay, without work, where there are no cgroups.
    unexpected = [line for line in left if "--target-jobs" not in line]
    assert not unexpected, "these still ran, and were killed:\n" + "\n".join(unexpected)


@pytest.fixture(scope="session")
def cluster(folder):
    cluster = Cluster(folder / "cluster")
    try:
        if cluster.start().returncode:
            said = (cluster.folder / "start.txt").read_text()
            pytest.fail(f"no SLURM cluster on this machine:\n{said[-3000:]}", pytrace=False)
        yield cluster
    finally:
        end(
            [process for process in processes_of(folder) if "--profile" in process.cmdline()]
        )  # they submit no more
        cluster.stop()


@pytest.fixture(scope="session")
def local(folder):
    """A checkout in which all rows were run without a cluster, undisturbed."""
    checkout = Checkout(folder / "local", STYLES + OWL)
    status, said = checkout.snakemake("--cores", "2")
    assert status == 0, said
    return checkout


@pytest.fixture(scope="session")
def clustered(folder, cluster):
    """A checkout whose rows were run on the cluster, first with one more row, whose delta is none."""
    checkout = Checkout(folder / "clustered", STYLES + OWL + BROKEN)
    (checkout.folder / "broken.safetensors").write_bytes(b"no delta")
    status, said = checkout.snakemake("--profile", "slurm")
    assert status not in (0, 124, 137), said
    assert len(list((checkout.folder / "results" / "scores").glob("*.parquet"))) == 3, said
    checkout.write(STYLES + OWL)
    status, said = checkout.snakemake("--profile", "slurm")
    assert status == 0, said
    return checkout


def assert_same_results(checkout, local, concepts):
    for name in ("scores.csv", "summary.csv"):
        table = checkout.read_table(name, concepts)
        assert {row["concept"] for row in table} == concepts
        assert table == local.read_table(name, concepts)
    mine, theirs = checkout.folder / "results", local.folder / "results"
    files = [path.relative_to(mine) for pattern in SAME for path in mine.glob(pattern)]
    assert len(files) >= 10
    different = [str(file) for file in files if (mine / file).read_bytes() != (theirs / file).read_bytes()]
    assert not different
    for delta in mine.glob("concepts/*/delta.safetensors"):
        assert split_delta(delta) == split_delta(theirs / delta.relative_to(mine))
    for record in mine.glob("concepts/*/training.parquet"):
        tables = [pq.read_table(file) for file in (record, theirs / record.relative_to(mine))]
        columns = [name for name in tables[0].column_names if name not in TIMED]
        assert str(tables[0].select(columns).to_pylist()) == str(tables[1].select(columns).to_pylist())


def split_delta(path):
    """A delta's header, in which the order of keys is random, and its numbers."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def attempts(jobs: list[Job]) -> dict[tuple[str, str], list[Job]]:
    """(rule, key) -> the unit's jobs, in the order in which they were submitted."""
    units = defaultdict(list)
    for job in sorted(jobs, key=lambda job: int(job.id)):
        units[job.rule, job.key].append(job)
    return dict(units)


def slurm_lost(checkout: Checkout, job: Job) -> bool:
    """Whether SLURM failed a job whose script never ran, as it does at times on a busy machine or when a node has come back."""
    return job.state == "FAILED" and "srun: error: Unable to " in log_of(checkout, job)


def log_of(checkout: Checkout, job: Job) -> str:
    (log,) = (checkout.folder / "results/logs/slurm").rglob(f"{job.id}.log")
    return log.read_text()


def done_jobs(said: str) -> set[str]:
    """The ids of the SLURM jobs whose work a run has counted as done."""
    submitted = dict(re.findall(r"^Job (\d+) has been submitted with SLURM jobid (\d+)", said, re.MULTILINE))
    done = re.findall(r"^Finished jobid: (\d+)", said, re.MULTILINE)
    # Among them rule all, which is no SLURM job.
    return {submitted[job] for job in done if job in submitted}


def test_rows_on_the_cluster_end_as_local_ones(clustered, local):
    assert_same_results(clustered, local, {"neon", "pencil", "owl"})


def test_a_row_that_fails_fails_alone_and_is_named(clustered, cluster):
    said = clustered.runs[0].read_text()
    assert "import_delta" in said and "broken.safetensors" in said
    jobs = [job for job in cluster.ended(clustered.run_names()) if job.rule == "import_delta"]
    # The profile's retries, and not as many more inside each job.
    assert len(jobs) == ATTEMPTS and {job.state for job in jobs} == {"FAILED"}


def test_shared_work_runs_once_and_nothing_twice(clustered, cluster):
    jobs = [job for job in cluster.ended(clustered.run_names()) if job.rule != "import_delta"]
    units = attempts([job for job in jobs if not slurm_lost(clustered, job)])
    assert {job.state for unit in units.values() for job in unit} == {"COMPLETED"}
    assert not [unit for unit, made in units.items() if len(made) > 1 and unit[0] not in REPORT]
    assert Counter(rule for rule, _ in units) == JOBS


def test_gpu_jobs_have_a_device_each_and_other_jobs_none(clustered, cluster):
    seen = {}
    for log in (clustered.folder / "results" / "logs").glob("*/*.log"):
        first = log.read_text().partition("\n")[0]
        seen[re.search(r"SLURM_JOB_ID=(\d+)", first)[1]] = re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", first)
    jobs = [job for job in cluster.ended(clustered.run_names()) if job.state == "COMPLETED"]
    gpu = [job for job in jobs if job.rule in GPU_RULES]
    assert all("gres/gpu=1" in job.devices and seen[job.id][1] in {"0", "1"} for job in gpu)
    assert not any("gres/gpu" in job.devices for job in jobs if job not in gpu)
    pairs = [
        (one, other)
        for one, other in itertools.combinations(gpu, 2)
        if one.node == other.node and one.start < other.end and other.start < one.end
    ]
    assert pairs and all(seen[one.id][1] != seen[other.id][1] for one, other in pairs)


def test_logs_are_kept_and_nothing_is_said_twice(clustered, cluster):
    said = clustered.said()
    assert said.count("3 concepts:") == 1 and said.count("Report: results/report/index.html") == 1
    names = clustered.run_names()
    assert len(names) == 2 and all(name.startswith("ablate_") for name in names)
    logs = {log.stem: log.read_text() for log in (clustered.folder / "results/logs/slurm").rglob("*.log")}
    jobs = cluster.ended(names)
    assert jobs and {job.id for job in jobs} <= set(logs)
    assert not any("concepts: " in text or "Report: " in text for text in logs.values())
    assert not list((clustered.folder / ".snakemake" / "plans").iterdir())


def test_work_that_died_is_done_again_to_the_same_end(folder, cluster, local):
    checkout = Checkout(folder / "died", STYLES)
    # Too little memory at first; and one rule without a GPU, as on a cluster that has none.
    own = {"generate_anchors": {"mem_mb": "750 * attempt ** 3"}, "score_concept": {"gpu": 0}}
    checkout.edit("slurm/config.yaml", {"set-resources": own})
    run, hurt = checkout.start("--profile", "slurm"), {}

    def hurt_one(job, ids):
        """Do the next harm to `job`, one of the running `ids`, if it lends itself; True once snakemake was killed."""
        base, slow = job.rule == "sample_base", hurt.get("time")
        if base and job.label == "style-picture" and not slow and cluster.hold(job):
            hurt["time"] = job
            cluster.end_its_time(job)
        elif base and job.label == "style-ink" and "cancel" not in hurt and cluster.hold(job):
            hurt["cancel"] = job
            cluster.cancel(job)
            checkout.write(OWL)  # the table is edited while the run goes on
        elif (
            job.rule in ("ablate_concept", "sample_ablated", "score_concept") and slow and "node" not in hurt
        ):
            if (job.node != slow.node or slow.id not in ids) and cluster.hold(job):
                hurt["node"] = job
                cluster.kill_node(job.node)
        elif job.rule == "score_concept" and len(hurt) == 3:
            psutil.Process(run.pid).children()[0].kill()
            return True
        return False

    def hurt_some():
        running = cluster.running()
        return any(hurt_one(job, {other.id for other in running}) for job in running)

    while not hurt_some():
        assert run.poll() is None, checkout.said()
        time.sleep(0.3)
    assert run.wait() in (-9, 137)
    assert cluster.start(hurt["node"].node).returncode == 0

    checkout.write(STYLES)
    assert checkout.snakemake("--profile", "slurm", "--unlock")[0] == 0
    status, said = checkout.snakemake("--profile", "slurm")
    assert status == 0, said
    assert_same_results(checkout, local, {"neon", "pencil"})

    jobs = cluster.ended(checkout.run_names())
    units, state = attempts(jobs), {job.id: job.state for job in jobs}
    assert state[hurt["time"].id] == "TIMEOUT"
    assert state[hurt["cancel"].id] == "CANCELLED"
    assert state[hurt["node"].id] == "NODE_FAIL"
    done = set().union(*(done_jobs(path.read_text()) for path in checkout.runs))
    # What was under way when Snakemake was killed may end well by itself: then no run counts it, and none does it again.
    left = {job.id for job in cluster.ended(checkout.run_names()[:1])} - done
    assert {made[-1].id for made in units.values()} <= done | left
    for made in units.values():
        *before, last = made
        assert last.state == "COMPLETED" and len(made) <= 2 * ATTEMPTS, made
        # Only work that died is done again, and what was under way when Snakemake was killed.
        assert not done & {job.id for job in before}, made
    # The state of too little memory is FAILED: OUT_OF_MEMORY is what SLURM says where it has cgroups. What was under way when
    # Snakemake was killed may find that the next run removed its file, to make it anew.
    for job in jobs:
        if job.state == "FAILED" and not slurm_lost(checkout, job):
            starved = job.rule == "generate_anchors" and "exceeded memory limit" in log_of(checkout, job)
            overtaken = job.id in left and units[job.rule, job.key][-1].id not in left
            assert starved or overtaken, log_of(checkout, job)
    (anchors,) = (made for (rule, _), made in units.items() if rule == "generate_anchors")
    assert memory(anchors[0]) == 750 < memory(anchors[-1])
    assert any("exceeded memory limit" in log_of(checkout, job) for job in anchors)
    assert units["sample_base", hurt["time"].key][-1].limit > "02:00:00"
    assert not any("gres/gpu" in job.devices for job in jobs if job.rule == "score_concept")


def memory(job: Job) -> int:
    """What a job asked for, in MB."""
    return int(job.memory.removesuffix("M"))


def test_a_job_of_a_node_that_hung_takes_nothing_from_its_retry(folder, cluster, local):
    """The node comes back after the retry is done; SLURM then ends the old job, whose Snakemake sees its script fail."""
    checkout = Checkout(folder / "hung", STYLES.splitlines(keepends=True)[0])
    run, old = checkout.start("--profile", "slurm", "--until", "sample_base"), None
    while old is None:
        assert run.poll() is None, checkout.said()
        old = next(
            (job for job in cluster.running() if job.rule == "sample_base" and cluster.hold(job)), None
        )
        time.sleep(0.3)
    frozen = cluster.freeze_node(old.node)
    assert run.wait() == 0, checkout.said()
    base, theirs = (one.folder / "results" / "base" for one in (checkout, local))
    made = {path.name for path in base.iterdir()}
    cluster.resume_node(old.node, frozen)
    assert len(made) == 3 and {path.name for path in base.iterdir()} == made
    assert not [name for name in made if (base / name).read_bytes() != (theirs / name).read_bytes()]
    state = {job.id: job.state for job in cluster.ended(checkout.run_names())}
    assert state[old.id] == "NODE_FAIL"
