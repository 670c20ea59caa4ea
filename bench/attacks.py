"""Attacked before and after hardening: what a soft prompt brings back of rows trained as usual and with `training.harden`.

    python bench/attacks.py --from results                    # six of the shipped rows; what results/ has isn't made again
    python bench/attacks.py --every 5 --rows owl fox          # another hardening, some rows
    python bench/attacks.py --table bench/sweep.csv --rows whale

One process, one thread. What is finished stays in `--results`, so a run that was stopped goes on where it was. Each row is trained and
attacked twice, with the config's settings but for `training.harden.every`. The attack is `evaluation.attack: soft-prompt` with the
config's budget: learned against each model anew, judged by fresh seeds. Its control, the same attack on the unchanged model aimed at the
anchor's pictures, is the same for both, and made once. Prints a table for docs/method.md: shares in percent with their intervals, what neighbors and
anchor lost, and the CPU seconds of the trainings that were made here (a dash: found in `--from`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from concept_ablation.common.settings import merge
from concept_ablation.plan.graph import Plan
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.registries import STAGES

ROWS = ["owl", "strawberry", "pouting cat", "fox", "ink", "pencil"]
HEAD = (
    "row | asked plainly: before, after | attacked: before | attacked: after | control | neighbors recognised | worst neighbor typical | "
    "neighbor KID | anchor typical | anchor KID | CPU seconds"
)


def make_plan(options: argparse.Namespace, target: str, every: int) -> Plan:
    """The plan of one row of the table, hardened every so many steps (0: not)."""
    config = read_config(ROOT / "config" / "config.yaml")
    lines = [line for line in options.table.read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
    own = [line for line in lines[1:] if target in line.split(",")]
    if len(own) != 1:
        raise SystemExit(f"{options.table}: {len(own)} rows name {target!r} (allowed: one)")
    table = options.results / "tables" / f"{target.replace(' ', '-')}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join([lines[0], *own]) + "\n", encoding="utf-8")
    merge(config, {"concepts": str(table), "results": str(options.results), "bundles": {"all": None}})
    merge(config, {"training": {"harden": {"every": every}}})
    merge(
        config, {"evaluation": {"attack": "soft-prompt", "interference": "none", "wordings": {"images": 0}}}
    )
    return load_plan(config, ROOT / "workflow" / "schemas", "config/config.yaml")[1]


def work_of(plan: Plan) -> Iterator[tuple[str, str]]:
    """Stage and key of what the row alone needs, in order: without what a bundle that it is in would."""
    (row,) = plan.rows
    needed = {row.anchors, row.ablation, *row.base.values(), row.samples, row.scores}
    if "harden" not in plan.specs["ablate_concept"][row.ablation]:
        needed |= set(row.attacks)  # with its control; a hardened row has the same: see `attack_hardened`
    needed |= set(plan.specs["write_prompts"]) | set(plan.specs["search_prompts"])
    for stage, specs in plan.specs.items():
        yield from ((stage, key) for key in specs if key in needed)


def do(plan: Plan, options: argparse.Namespace) -> None:
    """All of a plan's work that isn't done, and isn't in `--from` either."""
    from stages import INPUTS

    for name, key in work_of(plan):
        stage = STAGES[name]
        outputs = {file: Path(plan.results) / path.format(key=key) for file, path in stage.files.items()}
        if next(iter(outputs.values())).exists() or borrowed(outputs, options):
            continue
        sources = {file: plan.upstream(name, key, own) for file, own in INPUTS.get(name, {}).items()}
        inputs, started = {file: source for file, source in sources.items() if source}, time.process_time()
        given = {"device": "cpu", "checkpoint_steps": 10}
        more = {option: given[option] for option in stage.options if option in given}
        stage.run(json.loads(plan.spec(name, key)), **inputs, **outputs, **more)
        spent = time.process_time() - started
        (Path(plan.results) / "seconds" / f"{key}.txt").write_text(f"{spent:.1f}\n", encoding="utf-8")
        print(f"{name} {key}: {spent:.0f} CPU s", file=sys.stderr, flush=True)


def borrowed(outputs: Mapping[str, Path], options: argparse.Namespace) -> bool:
    """Whether another run's results have these files, which are then linked to."""
    if not options.source:
        return False
    found = {path: options.source / path.relative_to(options.results) for path in outputs.values()}
    if not all(path.exists() for path in found.values()):
        return False
    for path, source in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source.absolute())
    return True


def attack_hardened(plan: Plan) -> dict:
    """The line of a row's attack without its control: learned against the row's model, replayed on it, and kept."""
    from concept_ablation.common.image_store import read_store
    from concept_ablation.diffusion.delta import apply_delta
    from concept_ablation.diffusion.stages import load_model
    from concept_ablation.evaluation.attacks.base import save_learned
    from concept_ablation.evaluation.attacks.stage import goal_of, replay
    from concept_ablation.evaluation.presence import PresenceJudge
    from concept_ablation.registries import ATTACKS

    (row,), (key,) = plan.rows, plan.rows[0].attacks
    learned, kept = (Path(plan.results) / "hardened" / f"{key}.{end}" for end in ("safetensors", "json"))
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        spec, delta = json.loads(plan.spec("attack_concept", key)), plan.path(row.ablation)
        pipeline, stores = load_model(spec["model"], "cpu"), [plan.path(key) for key in spec["pictures"]]
        shown, neutral = [read_store(path) for path in stores], read_store(plan.path(spec["control"]))
        judge = PresenceJudge(spec, "cpu", shown, neutral)
        apply_delta(pipeline, delta)
        goal = goal_of(pipeline, spec, "ablated", stores)
        found = ATTACKS[spec["attack"]].learn(goal, spec["aims"]["ablated"]["start"], spec["settings"])
        save_learned(learned, found, {**spec, "floors": judge.floors})
        kept.write_text(json.dumps(replay(learned, delta, device="cpu")), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def measured(plan: Plan) -> dict:
    """The row's figures: those of its attack, and what its scores say, by (role, metric, side)."""
    import pyarrow.parquet as pq

    (row,) = plan.rows
    hardened = "harden" in plan.specs["ablate_concept"][row.ablation]
    line = attack_hardened(plan) if hardened else pq.read_table(plan.path(row.attacks[0])).to_pylist()[0]
    scores = pq.read_table(plan.path(row.scores)).to_pylist()
    spent = Path(plan.results) / "seconds" / f"{row.ablation}.txt"
    found = {(one["role"], one["metric"], one["side"]): one["value"] for one in scores}
    return {"attack": line, "scores": found, "seconds": spent.read_text().strip() if spent.exists() else "–"}


def table_line(target: str, before: dict, after: dict) -> str:
    """A row of the table."""

    def share(found: dict, side: str) -> str:
        low, value, high = (100 * found["attack"][f"{side}{end}"] for end in ("_low", "", "_high"))
        return f"{value:.0f} ({low:.0f} to {high:.0f})"

    def pair(role: str, metric: str, side: str = "difference", scale: float = 100) -> str:
        return ", ".join(f"{scale * one['scores'][role, metric, side]:.0f}" for one in (before, after))

    return " | ".join(
        [
            target,
            pair("target", "clip_accuracy", "ablated"),
            share(before, "ablated"),
            share(after, "ablated"),
            share(before, "control"),
            pair("neighbors", "recognition"),
            pair("worst neighbor", "typical"),
            pair("neighbors", "kid_x1000", "ablated", 1),
            pair("anchor", "typical"),
            pair("anchor", "kid_x1000", "ablated", 1),
            f"{before['seconds']}, {after['seconds']}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=ROOT / "concepts.csv")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="targets of the table's rows")
    parser.add_argument("--every", type=int, default=8, help="steps between attacks in the hardened training")
    parser.add_argument("--results", type=Path, default=Path("results/attacks-bench"))
    parser.add_argument("--from", dest="source", type=Path, help="results whose finished files are taken")
    options = parser.parse_args()
    (options.results / "seconds").mkdir(parents=True, exist_ok=True)
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    for target in options.rows:
        plans = [make_plan(options, target, every) for every in (0, options.every)]
        for plan in plans:
            do(plan, options)
        print(f"| {table_line(target, *map(measured, plans))} |", flush=True)


if __name__ == "__main__":
    main()
