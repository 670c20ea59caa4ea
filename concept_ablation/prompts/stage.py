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
    """The content of a prompts file: `prompts` and, from a search, `target_prompts`. Raises PromptsError."""
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        if written["prompts"] and all(isinstance(prompt, str) for prompt in written["prompts"]):
            return written
        problem = "it holds no prompts"
    except FileNotFoundError:
        raise PromptsError(f"{path}: there is no such file of prompts") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise damaged(PromptsError, path, f"damaged prompts ({problem})")


def write_prompts(
    spec: Mapping,
    prompts: str | Path,
    *,
    device: str = "auto",
    attempts: int = 1,
    timeout: float = 60.0,
    key_variable: str | None = None,
) -> list[str]:
    """Stage `write_prompts`: make the spec's anchor prompts, write them as JSON to `prompts` and return them.

    The source is a prompt file or a language model. A model's raw answers are kept beside `prompts` as
    `.answers.jsonl`. How
    it is asked is not part of the spec: at most `attempts` requests of `timeout` seconds each, with the key that is
    in the environment variable `key_variable`. Raises PromptsError.
    """
    source = spec["source"]
    if "file" in source:
        templates = read_templates(source["file"])
        if file_source(source["file"])["sha256"] != source["sha256"]:
            raise PromptsError(
                f"{source['file']}: was changed after this run was planned; start the run again"
            )
        made = KINDS[spec["kind"]].anchor_prompts(spec["anchor"], templates, spec["slots"], spec["count"])
    else:
        from concept_ablation.prompts.captions import write_by_model

        asking = {
            "device": device,
            "attempts": attempts,
            "timeout": timeout,
            "key_variable": key_variable or None,
        }
        made = write_by_model(
            {name: {**settings, **asking} for name, settings in source.items()},
            raw_path=Path(prompts).with_suffix(".answers.jsonl"),
            **{name: spec[name] for name in ("anchor", "kind", "targets", "count")},
        )
    content = {"kind": spec["kind"], "anchor": spec["anchor"], "prompts": made}
    with atomic_output(prompts) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("wrote %d prompts of %r to %s", len(made), spec["anchor"], prompts)
    return made
