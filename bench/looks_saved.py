"""What `evaluation.until` would have saved on a finished run whose numbers of pictures were fixed: its pictures are looked at again.

    python bench/looks_saved.py until.yaml [another.yaml ...]

The overlays name the run's table and results and switch `evaluation.until` on. Nothing is drawn: the pictures of a fixed number are those
that looks would have drawn, so their first ones are taken, look by look, as stage `sample_ablated` does. It prints a line a row: pictures
by the ablated model, the verdict of all pictures and that of the pictures needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from concept_ablation.common.image_store import read_store
from concept_ablation.common.settings import merge
from concept_ablation.evaluation.looks import Judge
from concept_ablation.plan.checks import ROOT
from concept_ablation.plan.graph import Plan
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan
from concept_ablation.verdict import Verdict, decide, read_thresholds

OFF = {"evaluation": {"until": {"half_width": None, "decided": False}}}


def plan_of(files: list[str], *layers: Mapping) -> Plan:
    config = read_config(ROOT / "config" / "config.yaml")
    for layer in [*map(read_config, files), *layers]:
        merge(config, layer)
    return load_plan(config, ROOT / "workflow" / "schemas", ", ".join(files))[1]


def look_again(
    spec: Mapping, samples: str, base: list[str], thresholds
) -> tuple[int, dict[str, int], Verdict]:
    """The pictures needed, the looks at each lane, and the verdict on these pictures."""
    judge, store, pictures = Judge(spec, base, "cpu"), read_store(samples), 0
    for number in range(judge.most):
        first, last = (place * spec["until"]["look"] for place in (number, number + 1))
        drawn = {}
        for probe in judge.open_probes():
            own = store.select(probe["role"], probe["subject"])
            drawn[probe["role"], probe["subject"]] = [own.image(i) for i in range(len(own))[first:last]]
        if not drawn:
            break
        pictures += sum(map(len, drawn.values()))
        judge.look({place: images for place, images in drawn.items() if images})
    presence, changes = judge.measured()
    return pictures, judge.taken, decide(spec["kind"], presence, changes, thresholds)


def main() -> None:
    fixed, until = plan_of(sys.argv[1:], OFF), plan_of(sys.argv[1:])
    thresholds, totals = read_thresholds({"verdict": fixed.report["verdict"]}), [0, 0]
    print(
        "| row | pictures, fixed | needed | looks | verdict of all | of those needed |\n|---|---|---|---|---|---|"
    )
    for before, row in zip(fixed.rows, until.rows, strict=True):
        spec = json.loads(until.spec("sample_ablated", row.samples))
        base = until.upstream("sample_ablated", row.samples, "base")
        samples = fixed.path(before.samples)
        at_once = {
            **spec,
            "until": {**spec["until"], "look": max(probe["images"] for probe in spec["probes"])},
        }
        pictures, looks, found = look_again(spec, samples, base, thresholds)
        _, _, whole = look_again(at_once, samples, base, thresholds)
        count = sum(probe["images"] for probe in spec["probes"])
        totals = [totals[0] + count, totals[1] + pictures]
        verdicts = f"{whole.verdict}, {whole.firmness} | {found.verdict}, {found.firmness}"
        taken = ", ".join(f"{lane} {number}" for lane, number in looks.items())
        print(f"| {row.concept.name} | {count} | {pictures} | {taken} | {verdicts} |", flush=True)
    print(f"| together | {totals[0]} | {totals[1]} | | | |")


if __name__ == "__main__":
    main()
