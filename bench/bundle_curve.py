"""How does one model of many rows hold up as rows are added? The first n of a table of trained rows, nested, for several ways.

    python bench/bundle_curve.py --results results/sweep                      # after `make sweep`: 1, 5, 10, 20, 40 rows, all ways
    python bench/bundle_curve.py --results DIR --how closed-form joint --counts 1 3 5 --rows 5
    python bench/bundle_curve.py --results DIR --set 'training: {steps: 20}' --name joint-20 --how joint

`--results` has the rows' deltas, pictures of their anchors and prompts (concepts/, anchors/, prompts/). They are read in place; all that
is made goes to `--out`, unit by unit as in a run of the workflow, so a run that was stopped goes on where it was. Each model draws every
row's targets, anchor and neighbors (`--images`), two pictures of twelve objects that none of its rows names, and the neutral prompts of
`bundles.general`. A line a way and count is printed and written to `--out`/curve.csv, with a figure, curve.svg. One process, one
model in memory at a time. Ways are those of `registries.WAYS`: one that is added there is there to be taken here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml

from concept_ablation.common.errors import UserError
from concept_ablation.common.settings import merge
from concept_ablation.plan.graph import Bundle, Plan
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.registries import STAGES, WAYS

READ = ("concepts", "anchors", "prompts")
MAKES = ("merge_deltas", "train_bundle", "repair_bundle")
COLUMNS = (
    *("name", "how", "n", "removed", "target_left", "neighbors_before", "neighbors", "neighbor_kid", "anchor", "anchor_kid"),
    *("unnamed_before", "unnamed", "unnamed_likeness", "kid", "kid_low", "kid_high", "kid_floor", "clip", "clip_base"),
    *("seconds", "error"),
)  # fmt: skip


def make_plan(options: argparse.Namespace, how: str, count: int) -> Plan:
    """The plan of the table's first `count` rows, all in one bundle."""
    config = read_config(ROOT / "config" / "config.yaml")
    config["model"]["path"] = str(options.embedded / "emoji-diffusion")
    for name, model in (("scorer", "emoji-clip"), ("descriptor", "emoji-copy")):
        config["evaluation"][name]["model"] = str(options.embedded / model)
    target, anchor, neighbor, neutral = options.images
    config["evaluation"]["images"] |= {"target": target, "anchor": anchor, "neighbor": neighbor}
    config["bundles"] |= {"all": f"first-{count}", "how": how, "named": {}}
    config["bundles"]["general"]["images"] = neutral
    merge(config["bundles"], yaml.safe_load(options.set) or {})
    lines = [line for line in options.table.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    table = options.out / f"first-{count}.csv"
    table.write_text("\n".join(lines[: count + 1]) + "\n", encoding="utf-8")
    config |= {"concepts": str(table), "results": str(options.out)}
    return load_plan(config, ROOT / "workflow" / "schemas", "config/config.yaml")[1]


def run(plan: Plan, key: str) -> float:
    """Do the work that a key needs and that isn't there, and the key's own; its seconds, read again if it was done before."""
    from stages import INPUTS

    name = plan.stages[key]
    stage, mark = STAGES[name], Path(plan.results) / "seconds" / f"{key}.txt"
    outputs = {file: f"{plan.results}/{path.format(key=key)}" for file, path in stage.files.items()}
    if not Path(next(iter(outputs.values()))).exists():
        found = {file: plan.upstream(name, key, own) for file, own in INPUTS.get(name, {}).items()}
        inputs = {file: source for file, source in found.items() if source}
        options = {"device": "auto"} if "device" in stage.options else {}
        started = time.perf_counter()
        stage.run(json.loads(plan.spec(name, key)), **inputs, **outputs, **options)
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(f"{time.perf_counter() - started:.2f}")
    return float(mark.read_text()) if mark.exists() else 0.0


def make(plan: Plan, bundle: Bundle) -> float:
    """Make the bundle's model, then draw and score all that it is judged by; the seconds that the model took."""
    for row in plan.rows:
        for key in (row.ablation, row.anchors):
            if not Path(plan.path(key)).exists():
                raise UserError(
                    f"{plan.path(key)} isn't there: {row.concept.name} is not trained, or by other settings"
                )
    work = {key: None for end in bundle.ends for key in plan.needed(end)}
    return sum(run(plan, key) * (plan.stages[key] in MAKES) for key in work)


def measure(plan: Plan, bundle: Bundle, options: argparse.Namespace) -> dict:
    """What came of it, as shares and changes of shares; means over rows."""
    from sweep import draw_unnamed

    from concept_ablation.report.bundles import general_columns
    from concept_ablation.report.summary import summarise
    from concept_ablation.report.tables import read_scores
    from concept_ablation.verdict import read_thresholds

    (spec,) = json.loads(plan.report_spec())["bundles"]
    thresholds = read_thresholds(json.loads(plan.report_spec()))
    lines = [summarise(row, read_scores(row["scores"]), thresholds) for row in spec["rows"]]

    def average(column: str) -> float | None:
        values = [float(line[column]) for line in lines if line[column] is not None]
        return statistics.mean(values) if values else None

    general = general_columns(spec["general"])
    before, after, likeness = measure_unnamed(options.embedded, plan, bundle, draw_unnamed)
    return {
        "removed": average("removed"),
        "target_left": average("presence_ablated"),
        "neighbors_before": average("neighbor_recognition_base"),
        "neighbors": average("neighbor_recognition_ablated"),
        "neighbor_kid": average("neighbor_kid_x1000"),
        "anchor": average("anchor_typical_change"),
        "anchor_kid": average("anchor_kid_x1000"),
        "unnamed_before": before,
        "unnamed": after,
        "unnamed_likeness": likeness,
        "kid": general["general_kid_x1000"],
        "kid_low": general["general_kid_x1000_low"],
        "kid_high": general["general_kid_x1000_high"],
        "kid_floor": general["general_kid_x1000_floor"],
        "clip": general["general_clip_score_2_5"],
        "clip_base": general["general_clip_score_2_5_base"],
    }


def measure_unnamed(embedded: Path, plan: Plan, bundle: Bundle, draw_unnamed) -> tuple[float, float, float]:
    """Of two pictures of each of twelve objects that no row names: recognised among all of the world before and after, and the
    mean cosine of the pictures of a seed. Where the rows leave fewer, those that no row removes count, too."""
    import numpy as np

    from concept_ablation.evaluation.clip import ClipScorer
    from embedded.build.world import OBJECTS, article

    concepts = [row.concept for row in plan.rows]
    gone = {target for concept in concepts for target in concept.targets}
    named = {name for concept in concepts for name in (concept.anchor, *concept.neighbors)} | gone
    free = [name for name in OBJECTS if name not in named]
    more = [name for name in OBJECTS if name in named - gone]
    others = free if len(free) >= 12 else [*free, *more]
    names = tuple(others[i * len(others) // 12] for i in range(12)) if len(free) >= 12 else tuple(others[:12])
    before, after = (draw_unnamed(embedded, names, delta) for delta in (None, plan.path(bundle.delta)))
    texts = ClipScorer(str(embedded / "emoji-clip")).text_features([article(name) for name in OBJECTS])
    own = np.repeat([OBJECTS.index(name) for name in names], 2)
    hits = [float(((side @ texts.T).argmax(1) == own).mean()) for side in (before, after)]
    return (*hits, float((before * after).sum(1).mean()))


def write(lines: list[dict], out: Path) -> None:
    """The table and the figure of all lines so far."""
    from concept_ablation.report.figures import curve_figure

    with (out / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")  # a table of an earlier version
        writer.writeheader()
        writer.writerows(lines)
    panels = {}
    for title, column in (("targets removed", "removed"), ("neighbors recognised", "neighbors"), ("unnamed recognised", "unnamed")):  # fmt: skip
        panels[title] = {
            name: [(int(line["n"]), float(line[column])) for line in lines if line["name"] == name and line.get(column) not in ("", None)]
            for name in dict.fromkeys(line["name"] for line in lines)
        }  # fmt: skip
    (out / "curve.svg").write_text(curve_figure(panels), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="folder of the trained rows")
    parser.add_argument("--table", type=Path, default=ROOT / "bench" / "sweep.csv", help="of these rows")
    parser.add_argument("--out", type=Path, help="default: bundle-curve beside the results")
    parser.add_argument("--how", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 5, 10, 20, 40])
    parser.add_argument("--rows", type=int, default=1000, help="counts above this are left out")
    parser.add_argument(
        "--images", nargs=4, type=int, default=[8, 8, 4, 48], metavar=("TARGET", "ANCHOR", "NEIGHBOR", "NEUTRAL")
    )  # fmt: skip
    parser.add_argument("--set", default="{}", help="settings of `bundles` that replace the config's, YAML")
    parser.add_argument("--name", help="of the lines of this run; default: the way's")
    parser.add_argument("--embedded", type=Path, default=Path("embedded"), help="folder of the three models")
    options = parser.parse_args()
    results, options.table = options.results.absolute(), options.table.absolute()
    options.out = (options.out or results.parent / "bundle-curve").absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in READ:
        if not (options.out / name).exists():
            (options.out / name).symlink_to(results / name)
    os.chdir(ROOT)
    table = options.out / "curve.csv"
    lines = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
    for how in options.how:
        for count in [count for count in options.counts if count <= options.rows]:
            name = options.name or how
            line = {"name": name, "how": how, "n": count}
            try:
                plan = make_plan(options, how, count)
                (bundle,) = plan.bundles
                seconds = make(plan, bundle)
                line |= {**measure(plan, bundle, options), "seconds": round(seconds, 1)}
            except UserError as error:
                line |= {"error": str(error)}
            lines = [old for old in lines if (old["name"], int(old["n"])) != (name, count)] + [line]
            write(lines, options.out)
            shown = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()]  # fmt: skip
            print("  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
