"""Results to try the page on, made in seconds: a table's plan with made-up deltas, and the report's pictures of what a test asks for."""

from pathlib import Path

import torch
import yaml

from concept_ablation.common.settings import merge
from concept_ablation.diffusion.delta import save_delta
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.stages import load_model
from concept_ablation.plan.graph import Plan
from concept_ablation.plan.schema import read_config
from concept_ablation.plan.specs import load_plan

ROOT = Path(__file__).parents[1]
SMALL = {
    "training": {"strength": "fixed", "preserve": "none"},
    "evaluation": {"images": {"target": 6, "anchor": 6, "neighbor": 6}, "interference": "none"},
    "runtime": {"device": "cpu"},
}


def plan_of(folder: Path, table: str, *overlays: dict) -> tuple[Plan, dict, Path]:
    """The plan of a table whose results are below `folder`, its config, and the overlay that says so."""
    (folder / "concepts.csv").write_text(table, encoding="utf-8")
    overlay = {"concepts": str(folder / "concepts.csv"), "results": str(folder / "results")}
    for more in (SMALL, *overlays):
        merge(overlay, more)
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    config = read_config(ROOT / "config" / "config.yaml")
    merge(config, read_config(path))
    return load_plan(config, ROOT / "workflow" / "schemas", str(path))[1], config, path


def write_deltas(plan: Plan, keys: list[str], pull: float = 0.3) -> None:
    """A delta for each of these keys, as a stage would write it: keys and values of the text, each moved by noise of its own."""
    pipeline = load_model(next(iter(plan.specs["sample_base"].values()))["model"], "cpu")
    family = family_of(pipeline)
    own = family.trainable_parameters(family.network(pipeline), "cross-attn")
    for number, key in enumerate(keys):
        draw = torch.Generator().manual_seed(number)
        tensors = {
            f"{family.network_name}.{name}": value
            + pull * value.std() * torch.randn(value.shape, generator=draw)
            for name, value in own.items()
        }
        path = Path(plan.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_delta(path, tensors, {"base_model": "made up"})
