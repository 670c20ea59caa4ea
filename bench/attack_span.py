"""How much of an attack a null space leaves possible: what it draws by that part of its encodings that no such training may change.

    python bench/attack_span.py results/attacks/KEY.safetensors --tolerances 1e-3 3e-3 1e-2

A change D in the null space of the preserved prompts has D h = 0 for every h in their span, so keys and values of that part of a learned
prompt's encoding are those of the unchanged model in every such training, hardened or not. Here the unchanged model draws from that
part alone, for the span of each tolerance (training.preserve_tolerance), and the row's own measure says how many pictures show the
target. LEARNED: what an attack learned (results/attacks or bench/attacks.py). The row's plan is taken from --table and the config.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from concept_ablation.common.image_store import Pictures, read_store
from concept_ablation.common.settings import merge
from concept_ablation.diffusion.placeholders import add_placeholders, filled, placed
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.diffusion.stages import load_model
from concept_ablation.evaluation.attacks.base import load_learned
from concept_ablation.evaluation.presence import PresenceJudge
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.preservation import preserved_prompts, second_moment, span
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan


def preserved_of(table: Path, results: Path, target: str) -> list[str]:
    """The preserved prompts of the table's row of a target, whose anchor's pictures lie in `results`."""
    config = read_config(ROOT / "config" / "config.yaml")
    merge(config, {"concepts": str(table), "results": str(results)})
    plan = load_plan(config, ROOT / "workflow" / "schemas", "config/config.yaml")[1]
    row = next(row for row in plan.rows if row.concept.target == target)
    spec = json.loads(plan.spec("ablate_concept", row.ablation))
    return preserved_prompts(spec, read_store(plan.path(row.anchors)).column("prompt"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("learned", type=Path, help="what an attack learned")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the row's anchor is")
    parser.add_argument("--table", type=Path, default=ROOT / "concepts.csv")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--images", type=int, default=12)
    options = parser.parse_args()
    found, spec = load_learned(options.learned)
    pipeline, judge = load_model(spec["model"], "cpu"), PresenceJudge(spec, "cpu")
    kept = preserved_of(options.table, options.results, spec["targets"][0])
    moment = second_moment(Encoder(pipeline).hidden(["", *kept]))
    text, own = add_placeholders(pipeline, spec["settings"]["tokens"]), spec["aims"]["ablated"]["prompts"][0]
    asked = [placed(own[i % len(own)], text) for i in range(options.images)]
    seeds = [spec["seed"] + i for i in range(options.images)]
    for tolerance in options.tolerances:
        basis = span(moment, tolerance).float()

        def within(module: object, inputs: object, output: object, basis: object = basis) -> object:
            output.last_hidden_state = (output.last_hidden_state @ basis) @ basis.T
            return output

        hook = pipeline.text_encoder.register_forward_hook(within)
        with filled(pipeline, found.rows):
            images = list(sample_images(pipeline, asked, seeds, sampler=spec["sampler"], batch_size=16))
        hook.remove()
        seen = judge.seen(Pictures(images))
        print(
            f"tolerance {tolerance:g}: {basis.shape[1]} of {basis.shape[0]} directions kept, target in {seen.mean():.0%} of {len(seen)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
