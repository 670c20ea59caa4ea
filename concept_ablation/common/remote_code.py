"""Find code in a model's folder that loading the model could run. Nothing is loaded or run to find it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

REFUSED = (
    "brings code of its own ({code}), which could do anything on this machine. If you trust where it is from, set "
    "model.trust_remote_code to true"
)
LIBRARIES = ("diffusers", "transformers")  # the libraries that parts of a pipeline may come from


def find_code(folder: str | Path) -> str | None:
    """The first thing in a model's folder that would run code from outside the installed libraries, or None."""
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
            continue  # an unreadable file runs no code; loading it reports the error
        if not isinstance(content, dict):
            continue
        name = path.relative_to(folder).as_posix()
        if "auto_map" in content:
            yield f"'auto_map' in {name}"
        if path.name == "model_index.json":
            yield from (f"{part} in {name}" for part in _foreign_parts(content))


def _foreign_parts(index: dict) -> Iterator[str]:
    """The parts in a `model_index.json` that come from other libraries than LIBRARIES."""
    if not isinstance(index.get("_class_name"), str):
        yield "'_class_name'"
    for part, kind in index.items():
        if isinstance(kind, list) and not part.startswith("_"):
            library = kind[0] if kind else None
            if library is not None and (not isinstance(library, str) or not _known(library)):
                yield repr(part)


def _known(library: str) -> bool:
    """Whether it is one of LIBRARIES, or the name by which diffusers' pipelines call their own modules."""
    return library.split(".")[0] in LIBRARIES or library == "stable_diffusion"
