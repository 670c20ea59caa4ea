"""The path by which published model cards and reports load a delta. New code imports from `concept_ablation` itself."""

from concept_ablation.diffusion.delta import apply_delta, load_delta
from concept_ablation.diffusion.pipeline import load_pipeline

__all__ = ["apply_delta", "load_delta", "load_pipeline"]
