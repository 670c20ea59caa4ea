"""Write a delta in the forms that other programs read. docs/formats.md describes each form.

The forms are a whole pipeline folder, the reference's two delta files (its diffusers code's and its CompVis code's), and a
LoRA with diffusers' or kohya's names. `delta_import` reads deltas that other programs wrote.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.files import atomic_output
from concept_ablation.common.hashes import fingerprint
from concept_ablation.common.text import size_text
from concept_ablation.diffusion.compvis import LayoutError
from concept_ablation.diffusion.delta import (
    METADATA_KEY,
    apply_delta,
    delta_parameters,
    load_delta,
    parse_token_row,
    sampling_of,
)
from concept_ablation.diffusion.delta_import import FormatError
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.formats import FORMATS, Format
from concept_ablation.diffusion.lora import factorise, save_diffusers, save_kohya
from concept_ablation.diffusion.pipeline import load_pipeline

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)
LORA_FORMS = ("lora", "kohya")
# The bound on each layer's relative error where neither rank nor bound is given: docs/formats.md has the measurements.
LORA_ERROR = 0.1


def export_delta(
    delta_path: str | Path,
    out_path: str | Path,
    form: Format,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    half: bool = False,
) -> str:
    """Write a delta to `out_path` in another form; returns what was written, in a line.

    `model`, `revision`, `config`: the base model, as for `load_pipeline`; by default the one that the delta names.
    `rank` or `error`: of the two LoRA forms, see `lora.factorise`. `half`: a pipeline's weights in fp16.
    Raises FormatError, DeltaError, ModelError, LoraError, LayoutError.
    """
    out = Path(out_path)
    _check_options(out, form, rank, error, half)
    tensors, metadata = load_delta(delta_path)
    if not tensors:
        drawn = f"; its pictures are drawn with {sampling_of(metadata)}" if sampling_of(metadata) else ""
        raise FormatError(f"{delta_path}: changes no weights, so there is no model to export{drawn}")
    pipeline = _load_base(metadata, model, revision, config)
    own = delta_parameters(pipeline, tensors)
    base = {name: own[name].detach().clone() for name in tensors if name in own}
    apply_delta(pipeline, delta_path)
    if form in LORA_FORMS:
        changes = {name: tensors[name] - base[name] for name in tensors}
        text = _write_lora(out, form, changes, pipeline, metadata, rank, error)
    elif form == "pipeline":
        text = _write_pipeline(out, pipeline, metadata, half)
    else:
        text = {"delta-bin": _write_delta_bin, "compvis": _write_compvis}[form](out, pipeline, tensors)
    text = f"{out}: {form}, {size_text(_size(out))}: {text}"
    log.info(text)
    return text


def _check_options(out: Path, form: Format, rank: int | None, error: float | None, half: bool) -> None:
    """Raise FormatError for an unknown form, for options that it hasn't, and for a folder that is there already."""
    if form not in FORMATS:
        raise FormatError(f"format {form!r} is unknown (allowed: {', '.join(FORMATS)})")
    if form not in LORA_FORMS and (rank, error) != (None, None):
        raise FormatError(f"format {form}: a rank or an error bound is for {' and '.join(LORA_FORMS)} alone")
    if half and form != "pipeline":
        raise FormatError(f"format {form}: fp16 is for pipeline alone, the others are fp32")
    if form == "pipeline" and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FormatError(f"{out}: is there already; give a new folder")


def _load_base(
    metadata: Mapping, model: str | Path | None, revision: str | None, config: str | None
) -> DiffusionPipeline:
    """The model that a delta changes, on the CPU. Warns if it isn't the one that the delta was made for."""
    if model is None:
        model, revision = metadata.get("base_model"), metadata.get("base_revision")
        config = config or metadata.get("base_config")
        if not model:
            raise FormatError("the delta doesn't say for which base model it was made; give the model")
    pipeline = load_pipeline(str(model), revision, "cpu", config)
    made_for = metadata.get("base_fingerprint")
    if made_for and os.path.exists(model) and fingerprint(str(model)) != made_for:
        log.warning(
            "%s has other files than the base model that the delta was made for (%s); the result holds the difference "
            "from this one",
            model,
            metadata.get("base_model"),
        )
    return pipeline


def _write_pipeline(out: Path, pipeline: DiffusionPipeline, metadata: Mapping, half: bool) -> str:
    """Write the whole model as a folder, with the delta's metadata in it: whole, or not at all."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        pipeline.to(dtype=torch.float16 if half else torch.float32).save_pretrained(part)
        (part / f"{METADATA_KEY}.json").write_text(json.dumps(metadata, indent=1, sort_keys=True), "utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"the whole model in {'fp16' if half else 'fp32'}"


def _write_delta_bin(out: Path, pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> str:
    """Write the form of the reference's diffusers code: a state dict a component. A text encoder can only be whole in it."""
    family = family_of(pipeline)
    network, changed = family.network_name, {name.partition(".")[0] for name in tensors}
    own = {n.removeprefix(f"{network}."): t for n, t in tensors.items() if n.startswith(f"{network}.")}
    content, text = {network: own}, f"{len(own)} tensors of the {network}"
    for component in sorted(changed - {network}):
        encoder = family.encoders(pipeline)[component]
        state = encoder.state_dict()
        if type(encoder).__name__ == "CLIPTextModel":
            # The name that transformers gave them when the reference was written, and before its version 5.
            state = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in state.items()}
        content[component] = dict(state)
        count = sum(name.startswith(f"{component}.") for name in tensors)
        text += f" and the whole {component} ({count} changed tensors)"
    with atomic_output(out) as part:
        torch.save(content, part)
    return text


def _write_compvis(out: Path, pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> str:
    """Write the form of the reference's CompVis code. The token embedding can only be whole in it."""
    family = family_of(pipeline)
    rows = [name for name in tensors if parse_token_row(name)]
    names = family.compvis_names(pipeline, [name for name in tensors if name not in rows])
    state = {theirs: tensors[name] for name, theirs in names.items()}
    text = f"{len(names)} tensors"
    if rows:
        table, *others = family.token_tables(pipeline).values()
        if others:
            raise LayoutError(f"{rows[0]}: a delta in CompVis's layout has one text encoder")
        state["embed"] = table.weight.detach().clone()
        text += f" and the whole token embedding ({len(rows)} changed rows)"
    with atomic_output(out) as part:
        torch.save({"state_dict": state}, part)
    return text


def _write_lora(
    out: Path,
    form: str,
    changes: Mapping[str, Tensor],
    pipeline: DiffusionPipeline,
    metadata: Mapping,
    rank: int | None,
    error: float | None,
) -> str:
    error = LORA_ERROR if rank is None and error is None else error
    family = family_of(pipeline)
    lora = factorise(changes, family.network_name, rank=rank, error=error)
    about = {**metadata, "lora": {"rank": rank, "error_bound": error, **lora.report()}}
    if form == "kohya":
        save_kohya(out, lora, about, family.kohya_names(pipeline, lora.layers))
    else:
        save_diffusers(out, lora, about)
    for name, layer in lora.layers.items():
        log.info("%s: rank %d, relative error %.3g", name, layer.rank, layer.error)
    return lora.summary()


def _size(path: Path) -> int:
    return (
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
