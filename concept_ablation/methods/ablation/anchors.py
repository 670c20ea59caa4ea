"""Stage `generate_anchors`: the anchor's images, which the ablation trains on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from concept_ablation.diffusion.stages import draw_probes, load_model, write_images
from concept_ablation.prompts.stage import read_prompts


def generate_anchors(
    spec: Mapping,
    prompts: str | Path,
    images: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Stage `generate_anchors`: images of the anchor's prompts by the unchanged model.

    The prompts' `target_prompts`, if any, go on into the store's metadata. Where the spec names a memorized picture
    (`image` and `descriptor`), copies of it are left out; they are counted as `copies_dropped` in the metadata. Raises
    SamplerError, and for a memorized picture MemorizationError and FeatureError.
    """
    written = read_prompts(prompts)
    pipeline = load_model(spec["model"], device)
    probe = {"role": None, "subject": None, "prompts": written["prompts"], "seed": spec["seed"]}
    draw = functools.partial(
        draw_probes,
        pipeline,
        sampler=spec["sampler"],
        batch_size=batch_size,
        negative_prompt=spec.get("negative_prompt"),
        progress=Path(images).stem,
    )
    metadata = {name: written[name] for name in ("target_prompts",) if name in written}
    if "image" in spec:
        # memorization imports this module.
        from concept_ablation.evaluation.memorized import CopyJudge, without_copies

        judge = CopyJudge(spec["image"], spec["descriptor"], pipeline.device)
        rows, dropped = without_copies(draw([{**probe, "images": 2 * spec["images"]}]), spec["images"], judge)
        metadata["copies_dropped"] = dropped
    else:
        rows = draw([{**probe, "images": spec["images"]}])
    write_images(images, rows, pipeline, spec, metadata)
