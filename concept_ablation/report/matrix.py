"""The heat map of who harms whom: which rows and victims it shows, in which order, and what a cell says.

Where other rows' subjects weren't measured, it shows what each row did to its own anchor and neighbors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from concept_ablation.common.roles import probe_roles
from concept_ablation.registries import KINDS

ROWS, COLUMNS = 40, 40
"""The most rows and victims that the page shows: those with the largest losses. The table has all."""


class Matrix(NamedTuple):
    """rows: the removed concepts; columns: a line of the table for each victim; cells: a line or None for each, row by row.

    hidden: how many rows and how many victims are left out.
    """

    rows: list[str]
    columns: list[Mapping]
    cells: list[list[Mapping | None]]
    hidden: tuple[int, int]


def make_matrix(
    measured: Mapping[str, Sequence[Mapping]], most_rows: int = ROWS, most_columns: int = COLUMNS
) -> Matrix | None:
    """The matrix of the table's lines by concept; None for fewer than two rows."""
    if len(measured) < 2:
        return None
    rows = _worst({concept: lines for concept, lines in measured.items()}, most_rows)
    by_victim: dict[tuple, list[Mapping]] = {}
    for concept in rows:
        for line in measured[concept]:
            by_victim.setdefault(_victim(line), []).append(line)
    columns = _worst(by_victim, most_columns)
    cells = {(line["concept"], _victim(line)): line for concept in rows for line in measured[concept]}
    values = np.array([[_value(cells.get((row, column))) for column in columns] for row in rows], dtype=float)
    rows = [rows[place] for place in cluster_order(values.reshape(len(rows), -1))]
    columns = [columns[place] for place in cluster_order(values.transpose(1, 0, 2).reshape(len(columns), -1))]
    everyone = {_victim(line) for lines in measured.values() for line in lines}
    return Matrix(
        rows,
        [by_victim[column][0] for column in columns],
        [[cells.get((row, column)) for column in columns] for row in rows],
        (len(measured) - len(rows), len(everyone) - len(columns)),
    )


def probe_lines(
    rows: Sequence[Mapping], scores: pa.Table, allowed: Mapping[str, float]
) -> dict[str, list[dict]]:
    """What each row did to its own anchor and neighbors, as `make_matrix` takes it: lines by concept.

    scores: the long table. allowed: role -> the loss of typical images beyond which it counts as harmed. `change` is that of the
    share of recognised images (neighbors) or of typical ones, whichever fell more; `p` is None, since no test is made.
    """
    chosen = pc.and_(pc.equal(scores["side"], "difference"), pc.is_in(scores["role"], pa.array([*allowed])))
    chosen = pc.and_(chosen, pc.is_in(scores["metric"], pa.array(["typical", "recognition"])))
    values = {
        (line["concept"], line["role"], line["probe"], line["metric"]): line["value"]
        for line in scores.filter(chosen).to_pylist()
    }
    found: dict[str, list[dict]] = {}
    for row in rows:
        for role, subject in probe_roles(row):
            place = row["concept"], role, subject
            typical, recognition = (values.get((*place, name)) for name in ("typical", "recognition"))
            if typical is not None:
                line = {
                    "concept": row["concept"],
                    "victim": subject,
                    "victim_kind": row["kind"],
                    "role": role,
                }
                line |= {"change": min(typical, recognition or 0.0), "harmed": typical < -allowed[role]}
                found.setdefault(row["concept"], []).append(line | {"p": None})
    return found


def cluster_order(vectors: np.ndarray) -> list[int]:
    """The rows of `vectors` (n, d) in an order in which alike ones are neighbors: the leaves of a tree.

    The tree joins the two clusters that are nearest in the mean distance of their members (average linkage), again and again; of
    two clusters the one with the earlier first row stands first.
    """
    distances = np.sqrt(np.maximum(0, np.square(vectors[:, None] - vectors[None]).sum(axis=2)))
    np.fill_diagonal(distances, np.inf)
    clusters = {place: [place] for place in range(len(vectors))}
    while len(clusters) > 1:
        one, other = sorted(divmod(int(distances.argmin()), len(vectors)))
        sizes = len(clusters[one]), len(clusters[other])
        joined = (sizes[0] * distances[one] + sizes[1] * distances[other]) / sum(sizes)
        distances[one] = distances[:, one] = joined
        distances[one, one] = np.inf
        distances[other] = distances[:, other] = np.inf
        clusters[one] += clusters.pop(other)
    return next(iter(clusters.values()), [])


def _victim(line: Mapping) -> tuple[str, bool]:
    """A subject as the plan tells it from others: by name, and by whether it is added to another prompt, as a style is."""
    return line["victim"].casefold(), line["role"] in KINDS[line["victim_kind"]].added_roles


def _worst(groups: Mapping, most: int) -> list:
    """The `most` groups of lines with the largest losses, in their order."""
    worst = sorted(groups, key=lambda name: min(line["change"] for line in groups[name]))[:most]
    return [name for name in groups if name in set(worst)]


def _value(line: Mapping | None) -> tuple[float, float]:
    """What a cell is clustered by: its change, and whether it was measured, so that rows with the same victims stand together."""
    return (0.0, 0.0) if line is None else (line["change"], 0.5)
