"""The page's lines of its rows: the summary's, with where a row stands on the page, what decides it, who is harmed by it."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from concept_ablation.common.roles import probe_roles
from concept_ablation.report.matrix import make_matrix, probe_lines
from concept_ablation.report.overview import overview_figure, overview_points
from concept_ablation.report.sections import deciding_targets, victim_ids
from concept_ablation.report.triage import standing, worst_neighbor_images
from concept_ablation.verdict import LOSSES, Thresholds


def rows_lines(
    rows: Sequence[Mapping],
    summary: Mapping[str, Mapping],
    scores: pa.Table,
    limits: Thresholds,
) -> list[dict]:
    """The summary's lines of the rows, each with its place on the page, the target that speaks for it, and how it stands."""
    lines = [summary[row["concept"]] | {"id": f"row-{number}"} for number, row in enumerate(rows, 1)]
    worst, found = worst_neighbor_images(scores), []
    for line, target, row in zip(lines, deciding_targets(lines, scores), rows, strict=True):
        images = {role: line[f"{role}_images"] for role in ("neighbor", "anchor")}
        images |= {"target": target.images, "worst_neighbor": worst.get(line["concept"])}
        own = {"deciding": target, "several": len(row["targets"]) > 1, "row": row}
        found.append(line | own | {"standing": standing(line, limits, images)})
    return found


def worst_first(rows: Sequence[Mapping], lines: Sequence[Mapping]) -> tuple[list[Mapping], list[Mapping]]:
    """Rows and their lines, those that a reader has to look at first at the head."""
    order = sorted(range(len(rows)), key=lambda place: lines[place]["standing"].order)
    return [rows[place] for place in order], [lines[place] for place in order]


def loss_limits(limits: Thresholds) -> dict[str, float]:
    """Columns of the summary that hold a change, `<column>_change` -> the loss that is allowed."""
    return {change.removesuffix("_change"): getattr(limits, f"{loss}_max") for loss, change in LOSSES.items()}


def overview(lines: Sequence[Mapping], loss_max: float) -> str | None:
    """The plot of all rows, an SVG; None for a single one, which its own cards show."""
    return overview_figure(overview_points(lines), loss_max) if len(lines) > 1 else None


def harm(
    rows: Sequence[Mapping],
    lines: Sequence[Mapping],
    measured: Mapping[str, Sequence[Mapping]],
    scores: pa.Table,
    limits: Thresholds,
) -> dict:
    """What the template is filled with for who harms whom, or, where that isn't measured, for what each row did to its own probes.

    victim_ids: where the page shows a row's victim, and cell_ids what a cell of the map is about, by both names.
    """
    places = {line["concept"]: line["id"] for line in lines}
    victims = {
        (row["concept"], line["victim"]): place
        for row in rows
        for line, place in zip(
            measured.get(row["concept"], ()), victim_ids(row, places[row["concept"]]), strict=False
        )
    }
    matrix, cells = make_matrix(measured), victims
    if matrix is None:
        allowed = {"anchor": limits.anchor_loss_max, "neighbor": limits.worst_neighbor_loss_max}
        matrix = make_matrix(probe_lines(rows, scores, allowed))
        cells = {
            (row["concept"], subject): f"{places[row['concept']]}-probe-{number}"
            for row in rows
            for number, (_, subject) in enumerate(probe_roles(row), 1)
        }
    return {
        "interference": measured,
        "matrix": matrix,
        "row_ids": places,
        "targets_of": {row["concept"]: row["targets"] for row in rows},
        "victim_ids": victims,
        "cell_ids": cells,
    }
