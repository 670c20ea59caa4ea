"""The report's plots as files for papers and slides: `figures/*.svg` beside the page, each written whole or not at all.

Grids of pictures are PNG, too, which slides and text programs take; lines and texts are better off as SVG, at any size.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import open_store
from concept_ablation.registries import KINDS
from concept_ablation.report.figures import Strip, grid_picture
from concept_ablation.report.matrix import Matrix
from concept_ablation.report.plots import grid_figure, matrix_figure, standalone

log = logging.getLogger(__name__)
GRIDS = 50
"""The most rows that get a grid of pictures: those that stand first on the page, which are the worst."""

SEEDS = 6
"""Pairs of pictures of a subject in a grid: the first ones, not chosen ones."""


def write_figures(
    folder: str | Path,
    lines: Sequence[Mapping],
    overview: str | None,
    matrix: Matrix | None,
    curves: str | None,
) -> list[str]:
    """Writes overview.svg, matrix.svg, curves.svg (those that there are), grid-NAME.svg and .png of the page's first rows; returns their names.

    lines: the page's, each with its `row`. A figure of an earlier report that is no longer made is removed. Raises StoreError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"overview": overview, "curves": curves}
    if matrix:
        names = [str(column["victim"]) for column in matrix.columns]
        plots["matrix"] = matrix_figure(matrix.rows, names, matrix.cells)
    written = [_write_svg(folder / f"{name}.svg", svg) for name, svg in plots.items() if svg]
    for name, title, strips in _grids(lines[:GRIDS]):
        written.append(_write_svg(folder / f"{name}.svg", grid_figure(title, strips)))
        with atomic_output(folder / f"{name}.png") as part:
            grid_picture(title, strips).save(part, format="PNG")
        written.append(f"{name}.png")
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        if old.name not in written:
            old.unlink()
    log.info("%s: %d figures", folder, len(written))
    return written


def _write_svg(path: Path, svg: str) -> str:
    with atomic_output(path) as part:
        part.write_text(standalone(svg) + "\n", encoding="utf-8")
    return path.name


def _grids(lines: Sequence[Mapping]) -> Iterator[tuple[str, str, list[Strip]]]:
    """Name, title and strips of each row's grid. Names are those of the deltas' folders, which are safe in a path, without their key if that is unique."""
    keys = [Path(line["delta"]).parent.name or line["id"] for line in lines]
    short = [key.rpartition(".")[0] or key for key in keys]
    for line, key, name in zip(lines, keys, short, strict=True):
        title = f"{line['concept']}: {line['verdict']}, {line['firmness']}"
        yield f"grid-{name if short.count(name) == 1 else key}", title, _strips(line)


def _strips(line: Mapping) -> list[Strip]:
    """A row's target, anchor and worst neighbor, before and after. Of a kind whose pictures are veiled the target is left out."""
    row = line["row"]
    places = [] if KINDS[row["kind"]].veiled else [("target", line["deciding"].target)]
    places += [("anchor", row["anchor"])]
    places += [("neighbor", line["worst_neighbor"])] if line.get("worst_neighbor") in row["neighbors"] else []
    samples, strips = open_store(row["samples"]), []
    for role, subject in places:
        before, after = open_store(str(row["base"][subject])), samples.select(role, subject)
        count = min(SEEDS, len(before), len(after))
        strips.append((f"{role}: {subject}", [(before.image(n), after.image(n)) for n in range(count)]))
    return strips
