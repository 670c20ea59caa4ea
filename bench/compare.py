"""Every method in one table, at equal erasure: what each left of the target, the neighbors, the anchor, and of what nobody named.

    make compare                                                      # runs bench/compare.csv by bench/compare.yaml, then this
    python bench/compare.py --results results/compare                 # of a run that is there
    python bench/compare.py --configfile bench/compare.yaml my.yaml   # with overlays of your own, such as fewer pictures

Reads the run's summary and scores. What the report doesn't know it draws itself: pictures of twelve objects of other categories, which
no row names, by each row's model, recognised among all objects of the world (`--unnamed` of each, from the same seeds; 0: none). They
are kept beside the results, so a second call draws nothing. Writes report/compare.csv (a line a method, numbers and intervals),
report/compare.svg (the figure) and report/unnamed.csv, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from concept_ablation.common.settings import merge
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.report.methods import MethodRows, cell, compare_methods, measures_of
from concept_ablation.report.methods_figure import methods_figure

SAMPLER = {"scheduler": "dpmsolver++", "steps": 8, "guidance_scale": 3.0, "eta": 0.0, "precision": "auto"}
SAMPLER |= {"height": None, "width": None}
SEED = 700_000_000
"""Far from the seeds of the report and of validation."""


def read_rows(configs: list[Path], results: Path | None) -> tuple[list[dict], list[dict], dict]:
    """The finished rows, the summary's lines of them, and the config that they were made with."""
    import pyarrow.parquet as pq

    config = read_config(ROOT / "config" / "config.yaml")
    for path in configs:
        merge(config, read_config(path))
    if results:
        config["results"] = str(results)
    config, plan = load_plan(config, ROOT / "workflow" / "schemas", str(configs[-1]))
    summary = pq.read_table(Path(plan.results) / "report" / "summary.parquet").to_pylist()
    lines = {line["concept"]: line for line in summary}
    rows = [row for row in json.loads(plan.report_spec())["rows"] if row["concept"] in lines]
    return rows, [lines[row["concept"]] for row in rows], config


class Unnamed:
    """Pictures of what no row names, by any model, recognised among all objects of the world. each: pictures of an object."""

    def __init__(self, config: Mapping, each: int) -> None:
        from concept_ablation import load_pipeline
        from concept_ablation.evaluation.clip import ClipScorer
        from embedded.build.world import OBJECTS, article

        self.each, self.pipeline = each, load_pipeline(config["model"]["path"])
        self.scorer = ClipScorer(config["evaluation"]["scorer"]["model"])
        self.texts = self.scorer.text_features([article(name) for name in OBJECTS])
        self.base: dict[tuple, float] = {}

    def change(self, row: Mapping) -> float:
        """The change of the share that is recognised, from the unchanged model's to the row's."""
        from sweep import unnamed_of

        from concept_ablation.diffusion.delta import delta_parameters, load_delta, sampling_of
        from concept_ablation.methods.strength import put

        names = unnamed_of(dict(row))
        if names not in self.base:
            self.base[names] = self._share(names, {})
        tensors, metadata = load_delta(row["delta"])
        own = delta_parameters(self.pipeline, tensors)
        before = {name: own[name].detach().clone() for name in tensors}
        put(own, tensors)
        found = self._share(names, sampling_of(metadata))
        put(own, before)
        return found - self.base[names]

    def _share(self, names: tuple[str, ...], drawing: Mapping) -> float:
        from concept_ablation.diffusion.sampler import sample_images
        from embedded.build.world import OBJECTS, article

        prompts = [f"here is {article(name)}" for name in names for _ in range(self.each)]
        seeds = [SEED + number for number in range(len(prompts))]
        images = list(sample_images(self.pipeline, prompts, seeds, sampler=SAMPLER, batch_size=16, **drawing))
        found = (self.scorer.image_features(images) @ self.texts.T).argmax(1)
        wanted = [OBJECTS.index(name) for name in names for _ in range(self.each)]
        return float((found == wanted).mean())


def add_unnamed(rows: list[dict], lines: list[dict], config: Mapping, each: int) -> None:
    """Put `unnamed_change` into the lines, drawn or from the table that an earlier call wrote."""
    path = Path(config["results"]) / "report" / "unnamed.csv"
    known = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            known = {(line["delta"], int(line["each"])): float(line["change"]) for line in csv.DictReader(file)}  # fmt: skip
    judge = None
    for number, (row, line) in enumerate(zip(rows, lines, strict=True), 1):
        if (row["delta"], each) not in known:
            judge = judge or Unnamed(config, each)
            known[row["delta"], each] = judge.change(row)
            print(f"{number} of {len(rows)} {row['concept']}: {known[row['delta'], each]:+.2f}", file=sys.stderr, flush=True)  # fmt: skip
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("delta", "each", "change"))
                writer.writerows((*place, change) for place, change in known.items())
        line["unnamed_change"] = known[row["delta"], each]


def write_table(path: Path, methods: list[MethodRows]) -> None:
    """A line a method: how many targets are gone, and each measure's mean with its interval and number of targets."""
    measures = measures_of(methods)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = [f"{one.column}{end}" for one in measures for end in ("", "_low", "_high", "_n")]
        writer.writerow(
            ("method", "targets", "removed", "strength_found", "removed_at_published_size", *heads)
        )
        for method in methods:
            values = [method.lines and len(method.lines), method.removed, method.found, method.at_once]
            for one in measures:
                values += [*(method.mean(one) or (None,) * 3), len(method.values(one))]
            writer.writerow((method.name, *values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configfile", type=Path, nargs="+", default=[ROOT / "bench" / "compare.yaml"], help="overlays"
    )
    parser.add_argument("--results", type=Path, help="the run's results, if not the overlay's")
    parser.add_argument("--unnamed", type=int, default=2, help="pictures of each object that no row names")
    options = parser.parse_args()
    rows, lines, config = read_rows(options.configfile, options.results)
    if options.unnamed:
        add_unnamed(rows, lines, config, options.unnamed)
    methods = compare_methods(rows, lines)
    folder = Path(config["results"]) / "report"
    write_table(folder / "compare.csv", methods)
    (folder / "compare.svg").write_text(methods_figure(methods) + "\n", encoding="utf-8")
    measures = measures_of(methods)
    print(
        "\t".join(
            ["method", "gone", "at equal erasure", "at published size", *(one.title for one in measures)]
        )
    )
    for method in methods:
        at_once = "–" if method.at_once is None else f"{method.at_once} of {method.searched}"
        counts = [f"{method.removed} of {len(method.lines)}", method.found, at_once]
        print("\t".join([method.name, *counts, *(cell(one, method) for one in measures)]))
    print(f"\n{folder}/compare.csv, compare.svg; the page is {folder}/index.html")


if __name__ == "__main__":
    main()
