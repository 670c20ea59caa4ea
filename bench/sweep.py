"""Do rows that nobody tuned come out? Many concepts of the embedded world, one line each, with the defaults or with one way to preserve.

    python bench/sweep.py                                   # make sweep: every row of bench/sweep.csv, defaults alone
    python bench/sweep.py --way fixed both --rows 20        # two ways to preserve beside each other, the first 20 rows
    python bench/sweep.py --embedded path/to/embedded       # another set of weights
    python bench/sweep.py --table bench/usual.csv           # targets that are the usual example of their anchor

Each row is trained, drawn and judged as in a run of the workflow, without its jobs: all stages in this process' workers, whose results
are shared by the ways. Beside the report's verdict it measures what the row doesn't name: 24 pictures of twelve objects of other
categories, recognised among all objects of the world. It prints a line a row and, at the end, how many came out, how often the
verdict on the report's seeds agrees with that on the validation looks, and the time.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from concept_ablation.common.settings import merge
from concept_ablation.plan.graph import Plan
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.registries import STAGES

OWN = {"ladder": [{}]}
WAYS = {
    "default": {},
    "fixed": {"preserve": "none", "strength": "fixed", "steps": 120, "learning_rate": 1e-4},
    "none": {"preserve": "none", "learning_rate": 1e-4, "search": OWN},
    "distill": {"preserve": "distill", "learning_rate": 3e-4, "search": OWN},
    "null-space": {"preserve": "null-space", "search": OWN},
    "both": {"preserve": "both", "search": OWN},
}
"""Changes to the config's `training`. `fixed` is the recipe of earlier versions, which knew no neighbors."""
GOOD = "removed, neighbors kept"


def make_plan(options: argparse.Namespace, way: str) -> Plan:
    """The plan of the table's first rows under one way."""
    config = read_config(ROOT / "config" / "config.yaml")
    models = {"model.path": "emoji-diffusion", "scorer": "emoji-clip", "descriptor": "emoji-copy"}
    config["model"]["path"] = str(options.embedded / models["model.path"])
    for name in ("scorer", "descriptor"):
        config["evaluation"][name]["model"] = str(options.embedded / models[name])
    for kind in config["kinds"].values():  # a way comes after the kinds' own settings
        merge(kind, {"training": WAYS[way]})
    table = options.results / f"table-{way}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in options.table.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    table.write_text("\n".join(lines[: options.rows + 1]) + "\n", encoding="utf-8")
    config |= {"concepts": str(table), "results": str(options.results)}
    return load_plan(config, ROOT / "workflow" / "schemas", "config/config.yaml")[1]


def start_worker() -> None:
    """One thread a worker: their number is what uses the machine."""
    import torch

    torch.set_num_threads(1)


def run_unit(unit: tuple[str, dict, dict, dict]) -> tuple[str, float]:
    """One unit of work of a stage, whose output isn't there yet; its outputs' folder and its seconds."""
    name, spec, inputs, outputs = unit
    started, options = time.perf_counter(), {}
    if "device" in STAGES[name].options:
        options["device"] = "auto"
    STAGES[name].run(spec, **inputs, **outputs, **options)
    return next(iter(outputs.values())), time.perf_counter() - started


def run_all(plan: Plan, pool: Pool) -> None:
    """All stages, one after the other, each stage's units side by side."""
    from stages import INPUTS

    for name, stage in STAGES.items():
        units = []
        for key in plan.specs[name]:
            outputs = {file: f"{plan.results}/{path.format(key=key)}" for file, path in stage.files.items()}
            found = {file: plan.upstream(name, key, own) for file, own in INPUTS.get(name, {}).items()}
            if not Path(next(iter(outputs.values()))).exists():
                inputs = {file: source for file, source in found.items() if source}
                units.append((name, json.loads(plan.spec(name, key)), inputs, outputs))
        for number, (path, seconds) in enumerate(pool.imap_unordered(run_unit, units), 1):
            print(
                f"{name} {number}/{len(units)}: {Path(path).parent.name} {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )


UNNAMED = {"scheduler": "dpmsolver++", "steps": 20, "guidance_scale": 3.0, "eta": 0.0, "precision": "auto"}


def unnamed_of(row: dict) -> tuple[str, ...]:
    """Twelve objects of categories other than the row's, spread over the world; for a style all are such."""
    from embedded.build.world import CATEGORIES, CATEGORY_OF, OBJECTS

    own = row["anchor"] if row["anchor"] in CATEGORIES else None
    others = [name for name in OBJECTS if CATEGORY_OF[name] != own and name not in row["targets"]]
    return tuple(others[i * len(others) // 12] for i in range(12))


@functools.cache
def draw_unnamed(embedded: Path, names: tuple[str, ...], delta: str | None):
    """CLIP features, (24, d) of length 1, of two pictures of each object, by the model with or without a delta."""
    from concept_ablation import apply_delta, load_pipeline
    from concept_ablation.diffusion.sampler import sample_images
    from concept_ablation.evaluation.clip import ClipScorer
    from embedded.build.world import article

    pipeline = load_pipeline(embedded / "emoji-diffusion")
    if delta:
        apply_delta(pipeline, delta)
    prompts = [f"here is {article(name)}" for name in names for _ in range(2)]
    seeds = [700_000_000 + i for i in range(len(prompts))]
    sampler = {**UNNAMED, "height": None, "width": None}
    images = sample_images(pipeline, prompts, seeds, sampler=sampler, batch_size=16)
    return ClipScorer(str(embedded / "emoji-clip")).image_features(images)


def measure_unnamed(work: tuple[Path, dict]) -> tuple[float, float, float]:
    """Objects that a row doesn't name: recognised among all of the world before and after, and the mean cosine of
    the pictures of a seed."""
    import numpy as np

    from concept_ablation.evaluation.clip import ClipScorer
    from embedded.build.world import OBJECTS, article

    embedded, row = work
    names = unnamed_of(row)
    before, after = draw_unnamed(embedded, names, None), draw_unnamed(embedded, names, row["delta"])
    texts = ClipScorer(str(embedded / "emoji-clip")).text_features([article(name) for name in OBJECTS])
    own = np.repeat([OBJECTS.index(name) for name in names], 2)
    hits = [float(((side @ texts.T).argmax(1) == own).mean()) for side in (before, after)]
    return (*hits, float((before * after).sum(1).mean()))


def report(plan: Plan, way: str, options: argparse.Namespace, pool: Pool, seconds: float) -> None:
    """Print a line a row, the summary of all, and write both beside the results."""
    import pyarrow.parquet as pq

    from concept_ablation.report.page import render
    from concept_ablation.report.tables import aggregate_scores

    folder = options.results / f"report-{way}"
    spec = json.loads(plan.report_spec())
    tables = (folder / "scores.parquet", folder / "summary.parquet")
    aggregate_scores(spec, *tables)
    render(spec, *tables, folder / "index.html")
    lines, rows = [], {row["concept"]: row for row in spec["rows"]}
    summary = pq.read_table(folder / "summary.parquet").to_pylist()
    work = [(options.embedded, rows[line["concept"]]) for line in summary]
    for line, (before, after, likeness) in zip(summary, pool.imap(measure_unnamed, work), strict=True):
        good = line["verdict"] == GOOD
        lines.append(
            {
                "concept": line["concept"],
                "verdict": line["verdict"],
                "firmness": line["firmness"],
                "target": line["presence_ablated"],
                "neighbors": line["neighbor_recognition_change"],
                "neighbor_kid": line["neighbor_kid_x1000"],
                "worst": line["worst_neighbor_typical_change"],
                "worst_neighbor": line["worst_neighbor"],
                "anchor": line["anchor_typical_change"],
                "anchor_kid": line["anchor_kid_x1000"],
                "unnamed": after - before,
                "unnamed_likeness": likeness,
                "found": line["strength_found"],
                "agrees": None if line["strength_found"] is None else line["strength_found"] == good,
                "settings": line["strength_settings"],
                "step": line["strength_step"],
                "scale": line["strength_scale"],
                "steps": line["steps"],
                "training_seconds": line["training_seconds"],
                "validation_seconds": line["validation_seconds"],
            }
        )
        print("  ".join(_short(value) for value in lines[-1].values()), flush=True)
    with (options.results / f"sweep-{way}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    good = [line for line in lines if line["verdict"] == GOOD]
    agree = [line["agrees"] for line in lines if line["agrees"] is not None]
    print(
        f"\n{way}: {len(good)} of {len(lines)} ({len(good) / len(lines):.0%}) {GOOD}; {seconds / 60:.0f} min"
    )
    for name in (
        "target",
        "neighbors",
        "neighbor_kid",
        "worst",
        "anchor",
        "anchor_kid",
        "unnamed",
        "unnamed_likeness",
    ):
        print(f"  mean {name}: {statistics.mean(line[name] for line in lines if line[name] is not None):.3f}")
    cost = [sum(line[f"{name}_seconds"] or 0 for line in lines) for name in ("training", "validation")]
    print(f"  training {cost[0]:.0f} s, validation {cost[1]:.0f} s")
    if agree:
        print(f"  the report's verdict agrees with the validation looks in {sum(agree)} of {len(agree)} rows")


def _short(value: object) -> str:
    return f"{value:+.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=ROOT / "bench" / "sweep.csv")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=["default"])
    parser.add_argument("--rows", type=int, default=1000, help="the first so many rows")
    parser.add_argument("--embedded", type=Path, default=Path("embedded"), help="folder of the three models")
    parser.add_argument("--results", type=Path, default=Path("results/sweep"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    options = parser.parse_args()
    options.table = options.table.absolute()
    os.chdir(ROOT)
    with mp.get_context("spawn").Pool(options.workers, start_worker) as pool:
        for way in options.way:
            started, plan = time.perf_counter(), make_plan(options, way)
            run_all(plan, pool)
            report(plan, way, options, pool, time.perf_counter() - started)


if __name__ == "__main__":
    main()
