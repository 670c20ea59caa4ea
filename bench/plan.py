"""What planning costs: Snakemake's dry-runs of made-up tables of 100, 1,000 and 10,000 rows. Nothing is run.

    python bench/plan.py                      # docs/performance.md holds the table that it prints
    python bench/plan.py --rows 10000 --floor # also an empty workflow of as many jobs: Snakemake's own share

The real Snakefile, config and embedded model are used, in a temporary folder. Targets are made up, under 50 anchors, with
four neighbors each, of ten that an anchor's rows share. `all`: nothing is there yet. `done`: every file is there, made up.
`one more`: the same, and a new row. Wall and CPU seconds, and the most memory, are the process's own.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from concept_ablation.plan.graph import Plan
from concept_ablation.plan.specs import load_plan

ROOT = Path(__file__).parents[1]
ANCHORS, NEIGHBORS, SHARED = 50, 4, 10
FLOOR = """
N = {rows}
STAGES = ["ablate", "sample", "score"]
rule report:
    input: expand("out/{{stage}}/{{n}}", stage=STAGES, n=range(N)), expand("out/base/{{n}}", n=range({base}))
rule base:
    output: "out/base/{{n}}"
    shell: "touch {{output}}"
rule ablate:
    output: "out/ablate/{{n}}"
    shell: "touch {{output}}"
rule sample:
    input: "out/ablate/{{n}}"
    output: "out/sample/{{n}}"
    shell: "touch {{output}}"
rule score:
    input: "out/sample/{{n}}", lambda w: [f"out/base/{{(int(w.n) * 5 + i) % {base}}}" for i in range(6)]
    output: "out/score/{{n}}"
    shell: "touch {{output}}"
"""


def write_table(path: Path, rows: int) -> None:
    """A table of `rows` made-up objects, in turn under each of the anchors."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["kind", "target", "anchor", "neighbors"])
        for row in range(rows):
            anchor, number = row % ANCHORS, row // ANCHORS
            kept = [f"kept{anchor} number{(number + i) % SHARED}" for i in range(NEIGHBORS)]
            table.writerow(["object", f"thing number{row}", f"anchor{anchor}", "; ".join(kept)])


def read_plan(folder: Path) -> Plan:
    """The plan of the table in `folder`."""
    os.chdir(folder)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    return load_plan(config, ROOT / "workflow" / "schemas", "config.yaml")[1]


def touch_outputs(plan: Plan) -> None:
    """Every file that a finished run leaves in the results folder, without its content."""
    files = {plan.path(key) for key in plan.stages} | {file for row in plan.rows for file in plan.files(row)}
    report = ("scores.parquet", "scores.csv", "summary.parquet", "summary.csv", "complete.json", "index.html")
    for file in [*sorted(files), *(f"{plan.results}/report/{name}" for name in report)]:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("made up")


def measure(command: list[str], folder: Path) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds and peak memory (MB) of a command, and its output."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, text=True)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if process.returncode:
        sys.exit(said[-3000:])
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, said


def jobs(said: str) -> int:
    """The number of jobs that a dry-run's table gives."""
    totals = [line.split()[1] for line in said.splitlines() if line.startswith("total ")]
    return int(totals[0]) if totals else 0


def bench(rows: int, floor: bool) -> None:
    """Measure one table's three dry-runs and print a line each."""
    dry_run = [sys.executable, "-m", "snakemake", "--dry-run", "--quiet", "rules", "--cores", "1"]
    real = [*dry_run, "--snakefile", str(ROOT / "Snakefile")]

    def show(case: str, command: list[str], folder: Path) -> int:
        wall, cpu, memory, said = measure(command, folder)
        print(f"| {rows:,} | {case} | {jobs(said):,} | {wall:.1f} | {cpu:.1f} | {memory:,.0f} |", flush=True)
        return jobs(said)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shared in ("config", "embedded"):
            (folder / shared).symlink_to(ROOT / shared)
        write_table(folder / "concepts.csv", rows)
        work = show("all", real, folder)
        if floor:
            (folder / "floor.smk").write_text(FLOOR.format(rows=rows, base=max(6, work - 3 * rows)))
            empty = [*dry_run, "--snakefile", "floor.smk", "--scheduler", "greedy"]
            show("empty workflow", [*empty, "--rerun-triggers", "mtime"], folder)
        touch_outputs(read_plan(folder))
        show("done", real, folder)
        write_table(folder / "concepts.csv", rows + 1)
        show("one more", real, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10_000], help="rows of the tables")
    parser.add_argument("--floor", action="store_true", help="also an empty workflow of as many jobs")
    options = parser.parse_args()
    print("| rows | dry-run of | jobs | seconds | CPU seconds | memory, MB |\n|---|---|---|---|---|---|")
    for rows in options.rows:
        bench(rows, options.floor)


if __name__ == "__main__":
    main()
