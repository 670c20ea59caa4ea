"""A model card for one concept: a folder with README.md, pictures and the delta, ready for a model hub.

Nothing is sent anywhere unless `push` is called. The table of concepts is data that people write, so every value is
escaped for Markdown, and the head is written by a YAML library.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.image_store import ImageStore, read_store
from concept_ablation.plan.families import family_of_model, pipeline_class
from concept_ablation.registries import KINDS
from concept_ablation.report.card_files import (
    DELTA,
    CardError,
    find_base,
    find_delta,
    make_folder,
    save_strip,
)
from concept_ablation.report.formatting import flat_settings, is_share
from concept_ablation.report.tables import missing_rows

log = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
UNLISTED = (
    "base_model",
    "base_revision",
    "base_fingerprint",
    "base_config",
    "kind",
    "targets",
    "anchor",
    "anchors",
)


def card_of_results(
    results: str | Path, concept: str, out_folder: str | Path, base_model: str | None = None
) -> Path:
    """Write the card of one concept that is finished; see `write_card`. Raises CardError, StoreError, DeltaError."""
    results = Path(results)
    summary = _read(results / "report" / "summary.parquet")
    lines = {line["concept"]: line for line in summary.to_pylist()}
    if concept in missing_rows(summary):
        raise CardError(
            f"{results}: {concept!r} is not finished ({results / 'report' / 'index.html'} says why); run the workflow again"
        )
    if concept not in lines:
        raise CardError(f"{results}: no concept {concept!r} (allowed: {', '.join(lines)})")
    scores = [
        line
        for line in _read(results / "report" / "scores.parquet").to_pylist()
        if line["concept"] == concept
    ]
    if not scores:
        raise CardError(f"{results}: no scores of {concept!r}; run the workflow again")
    samples = read_store(results / "samples" / f"{scores[0]['samples_key']}.parquet")
    delta = find_delta(results, Path(lines[concept]["delta"]))
    return write_card(
        out_folder,
        lines[concept],
        scores,
        delta,
        samples,
        find_base(results, samples),
        base_model=base_model,
    )


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CardError(f"{path}: can't be read ({error}); is this the folder of a run's results?") from error


def write_card(
    out_folder: str | Path,
    summary: Mapping,
    scores: Sequence[Mapping],
    delta_path: str | Path,
    samples: ImageStore,
    base: Mapping[str, ImageStore],
    *,
    base_model: str | None = None,
) -> Path:
    """Write README.md, pictures/ and delta.safetensors to `out_folder`; returns the folder.

    summary: the concept's line of the summary. scores: its lines of the long table. samples: the ablated model's pictures;
    base: subject -> the base model's. base_model: the base model's hub id, where the delta names a local folder.
    Raises CardError if the folder holds other things; StoreError, DeltaError.
    """
    from concept_ablation.diffusion.delta import load_delta

    tensors, metadata = load_delta(delta_path)
    if not tensors:
        raise CardError(f"{delta_path}: changes no weights, so there is no model for a card")
    out = make_folder(out_folder, delta_path)
    strips = list(_strips(out, summary["kind"], samples, base))
    shown = _shown(summary, scores, metadata, base_model) | {
        "strips": strips,
        "snippet": snippet(tensors, metadata, base_model),
        "measured": ", ".join(dict.fromkeys(probe["subject"] for probe in samples.metadata["probes"])),
    }
    text = environment().get_template("card.md.j2").render(shown)
    (out / "README.md").write_text(text, encoding="utf-8")
    log.info("%s: card of %s", out, summary["concept"])
    return out


def _shown(summary: Mapping, scores: Sequence[Mapping], metadata: Mapping, base_model: str | None) -> dict:
    """What the card says of a row, of its scores and of its delta's metadata."""
    return {
        "front_matter": front_matter(metadata, base_model),
        "base": base_name(metadata, base_model),
        "targets": ", ".join(metadata.get("targets") or [summary["target"]]),
        "anchor": summary["anchor"],
        "kind": summary["kind"],
        "neighbors": ", ".join(summary["neighbors"]),
        "verdict": summary["verdict"],
        "provisional": summary["firmness"] == "provisional",
        "hidden": not KINDS[summary["kind"]].publishable,
        "scores": _score_lines(scores),
        "features": ", ".join(dict.fromkeys(line["features"] for line in scores if line["features"])),
        "settings": list(flat_settings(dict(sorted(metadata.items())), UNLISTED)),
    }


def _strips(out: Path, kind: str, samples: ImageStore, base: Mapping[str, ImageStore]):
    """Save one PNG a probe: the base model's pictures above, the ablated model's below."""
    for number, probe in enumerate(samples.metadata["probes"], 1):
        if KINDS[kind].publishable or probe["role"] != "target":
            strip = save_strip(out, number, probe, samples, base[probe["subject"]])
            yield from [strip] if strip else []


def front_matter(metadata: Mapping, base_model: str | None) -> str:
    """The card's head in YAML, without its lines of dashes. metadata: the delta's."""
    from huggingface_hub import ModelCardData

    family = family_of_model(_model(metadata))
    tags = ["concept-ablation", family.tag if family else "stable-diffusion", "text-to-image"]
    base_model = base_model or metadata.get("base_model")
    named = {"base_model": base_model} if is_hub_id(base_model) else {}
    data = ModelCardData(license="other", tags=tags, pipeline_tag="text-to-image", **named)
    return data.to_yaml()


def is_hub_id(name: object) -> bool:
    """Whether `name` is a model hub's id, and no folder or file here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1 or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def base_name(metadata: Mapping, base_model: str | None) -> str:
    """The base model as a reader is told it: no folders of the machine that made the card."""
    name = base_model or str(metadata.get("base_model"))
    return Path(name).name if os.path.isabs(name) else name


def snippet(names: Sequence[str] | Mapping, metadata: Mapping, base_model: str | None) -> str:
    """Python that loads the base model and the delta beside the card."""
    base, kind = base_name(metadata, base_model), _pipeline_class(names, metadata)
    revision = None if base_model else metadata.get("base_revision")
    load = f"{kind}.from_pretrained({base!r}{f', revision={revision!r}' if revision else ''})"
    if base.endswith((".safetensors", ".ckpt")):
        load = f"{kind}.from_single_file({base!r})"
    parts = {name.partition(".")[0] for name in names}
    if len(parts) > 1 or not parts <= {"unet", "transformer"}:  # token rows are no parameters of their own
        return (
            f"from diffusers import {kind}\n\nfrom concept_ablation import apply_delta\n\n"
            f"pipeline = {load}\napply_delta(pipeline, {DELTA!r})"
        )
    (part,) = parts
    return (
        f"from diffusers import {kind}\nfrom safetensors.torch import load_file\n\n"
        f"pipeline = {load}\n"
        f'delta = {{name.removeprefix("{part}."): value for name, value in load_file({DELTA!r}).items()}}\n'
        f"pipeline.{part}.load_state_dict(delta, strict=False)"
    )


def _pipeline_class(names: Iterable[str], metadata: Mapping) -> str:
    """The class that loads the base model: what its folder says, if it is here; else diffusers' own choice, where it has one."""
    plain = all(not name.startswith("transformer.") for name in names)
    return pipeline_class(_model(metadata)) or ("StableDiffusionPipeline" if plain else "DiffusionPipeline")


def _model(metadata: Mapping) -> dict:
    """The base model that a delta's metadata name, as a spec has it."""
    model = {"path": str(metadata.get("base_model")), "revision": metadata.get("base_revision")}
    return model | {"config": metadata.get("base_config")}


def _score_lines(scores: Sequence[Mapping]) -> list[dict]:
    """One line a probe and metric, with both models' values and the change between them as text."""
    lines: dict[tuple, dict] = {}
    for score in scores:
        place = {name: score[name] for name in ("role", "probe", "metric")}
        line = lines.setdefault(
            tuple(place.values()), place | {"base": "", "ablated": "", "change": "", "n": score["n"]}
        )
        line["change" if score["side"] == "difference" else score["side"]] = _with_interval(score)
    return list(lines.values())


def _with_interval(score: Mapping) -> str:
    """ "5 % [1 %, 14 %]", a change in points, other metrics as they are."""
    share, change = is_share(score["metric"]), score["side"] == "difference"

    def number(value: float | None) -> str:
        if value is None:
            return "–"
        if share:
            return f"{100 * value:+.1f}" if change else f"{100 * value:.0f} %"
        return f"{value:+.3g}" if change else f"{value:.3g}"

    return f"{number(score['value'])} [{number(score['ci_low'])}, {number(score['ci_high'])}]"


def environment() -> jinja2.Environment:
    """Templates of Markdown: values are escaped by the filter `md`, not as HTML."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["md"] = escape
    return made


def escape(text: object) -> str:
    """A value as plain text within a line of Markdown, or a cell of its tables: no markup, no HTML, no line breaks."""
    plain = " ".join(str(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]()#|~$!])", r"\\\1", plain)


def push(folder: str | Path, repo_id: str) -> str:
    """Upload a card's folder to a model hub, to a new private repository or an existing one; returns its address.

    Raises CardError for a name that is no repository's.
    """
    from huggingface_hub import HfApi

    if not is_hub_id(repo_id):
        raise CardError(f"{repo_id!r} is no repository's name (allowed: OWNER/NAME)")
    api = HfApi()
    api.create_repo(repo_id, repo_type="model", private=True, exist_ok=True)
    return str(api.upload_folder(folder_path=str(folder), repo_id=repo_id, repo_type="model"))
