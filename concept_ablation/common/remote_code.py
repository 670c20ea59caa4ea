"""Does a model's folder bring code of its own? Looked up without running any of it, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

REFUSED = (
    "brings code of its own ({code}), which could do anything on this machine. If you trust where it is from, set "
    "model.allow_custom_code to true"
)
LIBRARIES = ("diffusers", "transformers")  # what a part of a pipeline may be of


def find_code(folder: str | Path) -> str | None:
    """What in a model's folder would run code that is not of an installed library, or None."""
    return next(_code(Path(folder)), None)


def _code(folder: Path) -> Iterator[str]:
    for script in sorted(folder.rglob("*.py")):
        yield script.relative_to(folder).as_posix()
    for path in sorted(folder.rglob("*.json")):
        if not path.name.endswith("config.json") and path.name != "model_index.json":
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # what can't be read isn't run either; loading it says so
        if not isinstance(content, dict):
            continue
        name = path.relative_to(folder).as_posix()
        if "auto_map" in content:
            yield f"'auto_map' in {name}"
        if path.name == "model_index.json":
            yield from (f"{part} in {name}" for part in _foreign_parts(content))


def _foreign_parts(index: dict) -> Iterator[str]:
    """The entries of a `model_index.json` that are not of LIBRARIES."""
    if not isinstance(index.get("_class_name"), str):
        yield "'_class_name'"
    for part, kind in index.items():
        if isinstance(kind, list) and not part.startswith("_"):
            library = kind[0] if kind else None
            if library is not None and (not isinstance(library, str) or not _known(library)):
                yield repr(part)


def _known(library: str) -> bool:
    """A library, or one of the module names that diffusers' own pipelines use for their parts (`stable_diffusion`)."""
    return library.split(".")[0] in LIBRARIES or library == "stable_diffusion"
