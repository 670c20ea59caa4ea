"""What the page hands over: the files beside it, the settings of the judgement, versions, and commands to go on with."""

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

from concept_ablation import __version__
from concept_ablation.common.text import size_text

TABLES = {
    "summary": "one line a concept, with verdict and intervals",
    "scores": "every metric of every probe and model",
    "images": "one line a picture, with every metric's number",
    "interference": "what each row's model did to other rows' subjects",
    "attacks": "what was tried to bring targets back, and how often it did",
    "bundles": "the rows once more, under the model of their bundle",
    "costs": "what each job took",
}
"""Tables that may lie beside the page -> what they hold."""

LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "snakemake")


def handover(folder: str | Path, spec: Mapping, figures: Sequence[str]) -> dict:
    """What the template is filled with. folder: the page's; figures: the files that `paper_figures.write_figures` wrote.

    tables: name, what it holds, its files as (name, size). figures: each as (SVG, PNG, empty where there is none). versions: name and
    version. settings: the judgement's, as JSON.
    """
    folder = Path(folder)
    tables = [
        (name, words, [(file.name, size_text(file.stat().st_size)) for file in _forms(folder, name)])
        for name, words in TABLES.items()
    ]
    return {
        "tables": [table for table in tables if table[2]],
        "figures": [
            (name, pixels if (pixels := f"{name[:-4]}.png") in figures else "")
            for name in figures
            if name.endswith(".svg")
        ],
        "versions": _versions(),
        "settings": json.dumps({"verdict": spec["verdict"], "report": spec["page"]}, indent=2),
    }


def results_of(lines: Sequence[Mapping]) -> str:
    """The results' folder as the rows' deltas name it, three folders above them."""
    above = [str(folder) for line in lines[:1] for folder in Path(line["delta"]).parents]
    return above[2] if len(above) > 2 else "results"


def link_to(path: str | Path, results: str | Path) -> str:
    """A file of the results as the page, which lies in their `report`, links to it; a path elsewhere stays as it is."""
    path, results = Path(path), Path(results)
    inside = path.is_relative_to(results)
    return quote(f"../{path.relative_to(results)}" if inside else str(path))


def card_command(concept: str, results: str | Path) -> str:
    """The command that writes a concept's model card, quoted for a shell."""
    return shlex.join(
        ["python", "-m", "concept_ablation", "card", "--out", "card", "--", str(results), concept]
    )


def _forms(folder: Path, name: str) -> list[Path]:
    return [path for end in ("parquet", "csv") if (path := folder / f"{name}.{end}").is_file()]


def _versions() -> list[tuple[str, str]]:
    """This program, Python, and the libraries that are installed where the page is made."""
    found = [("concept-ablation", __version__), ("Python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found
