"""Ablate concepts from text-to-image diffusion models, measure what is gone and what else was harmed.

Everything here can be used and tested without Snakemake; the rules in `workflow/` only call it. What a user of a result
needs is here by name: `load_pipeline` and `apply_delta`. docs/design.md is the map of the rest.
"""

from importlib import import_module

__version__ = "0.1.0"
OFFERED = {
    "apply_delta": "concept_ablation.diffusion.delta",
    "load_delta": "concept_ablation.diffusion.delta",
    "load_pipeline": "concept_ablation.diffusion.pipeline",
}
"""What `from concept_ablation import ...` gives, loaded when asked for: torch takes seconds."""


def __getattr__(name: str) -> object:
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(OFFERED[name]), name)
