"""Stage `write_prompts`: the prompts of one anchor, from a file or from a language model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from concept_ablation.common.files import atomic_output, damaged
from concept_ablation.prompts.templates import PromptsError, file_source, read_templates
from concept_ablation.registries import KINDS

log = logging.getLogger(__name__)


def read_prompts(path: str | Path) -> dict:
    """What `write_prompts` or a search wrote: `prompts`, and of a search `target_prompts`. Raises PromptsError."""
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        if written["prompts"] and all(isinstance(prompt, str) for prompt in written["prompts"]):
            return written
        problem = "it holds no prompts"
    except FileNotFoundError:
        raise PromptsError(f"{path}: there are no such prompts") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise damaged(PromptsError, path, f"damaged prompts ({problem})")


def write_prompts(spec: Mapping, path: str | Path, asking: Mapping | None = None) -> list[str]:
    """Stage `write_prompts`: make the spec's anchor prompts and write them as JSON to `path`.

    Their source is a file, or a language model, whose raw answers are kept beside `path` as `.answers.jsonl`. `asking`:
    how a model is asked, which is no part of the spec: `attempts`, `timeout` (s), `key_variable`, `device`. Raises
    PromptsError.
    """
    source = spec["source"]
    if "file" in source:
        templates = read_templates(source["file"])
        if file_source(source["file"])["sha256"] != source["sha256"]:
            raise PromptsError(f"{source['file']}: was changed after this run was planned; start it again")
        prompts = KINDS[spec["kind"]].anchor_prompts(spec["anchor"], templates, spec["slots"], spec["count"])
    else:
        from concept_ablation.prompts.captions import write_by_model

        answers = Path(path).with_suffix(".answers.jsonl")
        words = {name: spec[name] for name in ("anchor", "kind", "targets", "count")}
        source = {name: {**settings, **(asking or {})} for name, settings in source.items()}
        prompts = write_by_model(source, raw_path=answers, **words)
    content = {"kind": spec["kind"], "anchor": spec["anchor"], "prompts": prompts}
    with atomic_output(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("wrote %d prompts of %r to %s", len(prompts), spec["anchor"], path)
    return prompts
