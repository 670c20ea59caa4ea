"""The overview of all rows: what is left of each target against what its removal did to the worst neighbor."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from concept_ablation.report.formatting import points, share
from concept_ablation.report.plots import COLORS, line_between, open_svg, rectangle, words
from concept_ablation.report.triage import VERDICT_COLORS

LABELS = 14
"""The most names that the overview writes beside its points: of rows that aren't firm, the worst first."""


class Point(NamedTuple):
    """A row in the overview: x, the target's share, and y, the worst neighbor's change, each with its interval.

    y is None where the row has no neighbors. color: the verdict's; firm: else the point is hollow; limit: the share that counts as removed.
    """

    place: str
    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float] | None
    color: str
    firm: bool
    limit: float
    text: str


def overview_points(lines: Iterable[Mapping]) -> list[Point]:
    """The page's lines as points of the overview, in their order."""
    found = []
    for line in lines:
        target, worst = line["deciding"], line.get("worst_neighbor")
        changes = tuple(line.get(f"worst_neighbor_typical_change{end}") for end in ("", "_low", "_high"))
        text = f"{line['concept']}: {line['verdict']}, {line['firmness']}. Target still there {share(target.ablated)}"
        text += f"; worst neighbor {worst} {points(changes[0])} points" if worst else ""
        found.append(
            Point(
                line["id"],
                line["concept"],
                (target.ablated, target.low, target.high),
                changes if changes[0] is not None else None,
                VERDICT_COLORS.get(line["verdict"], "open"),
                line["firmness"] == "firm",
                line["target_limit"],
                text,
            )
        )
    return found


class _Axes:
    """Places in the overview: x from 0 to `right`, y from `bottom` to `top`; rows without y lie in a band below."""

    width, left, upper = 760, 58, 14
    inner, deep = 686, 290

    def __init__(self, points: Sequence[Point], loss_max: float) -> None:
        ys = [value for point in points if point.y for value in point.y] or [0.0]
        xs = [value for point in points for value in (*point.x, min(1.0, 1.5 * point.limit))]
        self.right = min(1.0, math.ceil(10 * max(xs, default=0.2) - 1e-9) / 10)
        self.bottom = max(-1.0, math.floor(10 * min(*ys, -1.2 * loss_max) + 1e-9) / 10)
        self.top = min(1.0, max(0.1, math.ceil(10 * max(ys) - 1e-9) / 10))
        self.foot = self.upper + self.deep + (20 if any(point.y is None for point in points) else 0)

    def x(self, share: float) -> float:
        return self.left + self.inner * min(max(share / self.right, 0.0), 1.0)

    def y(self, change: float) -> float:
        place = (self.top - change) / (self.top - self.bottom)
        return self.upper + self.deep * min(max(place, 0.0), 1.0)


def overview_figure(rows: Sequence[Point], loss_max: float) -> str:
    """Each row at its target's share (across) and its worst neighbor's change (upwards), with whiskers and the zone of success."""
    axes = _Axes(rows, loss_max)
    parts = [
        open_svg(
            axes.width,
            axes.foot + 52,
            "overview-plot",
            "Every row: target still there against the worst neighbor's change",
        )
    ]
    limits = sorted(point.limit for point in rows)
    for limit in (
        {limits[0], limits[-1]} if limits else ()
    ):  # where limits differ, the least one's zone is the darker
        parts.append(rectangle("zone", axes.x(0), axes.upper, axes.x(limit) - axes.x(0), axes.y(-loss_max) - axes.upper, COLORS["good"], 'fill-opacity=".1"'))  # fmt: skip
    parts += _grid(axes)
    for point, shift in reversed(
        list(zip(rows, _spread(axes, rows), strict=True))
    ):  # the worst last, so on top
        parts.append(_mark(axes, point, shift))
    return "\n".join([*parts, *_labels(axes, rows), "</svg>"])


def _grid(axes: _Axes) -> Iterable[str]:
    """The axes' lines, numbers and names."""
    low, step = axes.foot, 0.1 if axes.right <= 0.5 else 0.2
    if low > axes.upper + axes.deep:
        yield words(axes.left - 6, low - 6, "none", "end")
    for number in range(round(axes.right / step) + 1):
        x = axes.x(number * step)
        yield line_between("rail", x, x, axes.upper, low)
        yield words(x, low + 20, f"{100 * number * step:.0f}%", "middle")
    step = 0.1 if axes.top - axes.bottom <= 0.6 else 0.2
    for number in range(math.ceil(axes.bottom / step), math.floor(axes.top / step + 1e-9) + 1):
        y = axes.y(number * step)
        yield line_between("axis" if number == 0 else "rail", axes.left, axes.left + axes.inner, y, y)
        yield words(axes.left - 6, y + 4, f"{100 * number * step:+.0f}".replace("-", "−") if number else "0", "end")  # fmt: skip
    middle = axes.upper + axes.deep / 2
    yield words(
        axes.left + axes.inner / 2, low + 44, "target still there, share of its images after", "middle"
    )
    yield words(
        14,
        middle,
        "worst neighbor, change in points",
        "middle",
        f'class="up" transform="rotate(-90 14 {middle})"',
    )


def _spread(axes: _Axes, rows: Sequence[Point]) -> list[tuple[float, float]]:
    """How far each point is moved, so that rows with the same values are all seen: on a sunflower's spiral around their place."""
    places = [(round(axes.x(point.x[0])), round(axes.y(point.y[0])) if point.y else None) for point in rows]
    shifts, seen = [], dict.fromkeys(places, 0)
    for place in places:
        number, wide = seen[place], min(8.0, 36 / math.sqrt(places.count(place)))
        seen[place] += 1
        far, turn = wide * math.sqrt(number), number * math.pi * (3 - math.sqrt(5))
        across = far * math.cos(turn)
        shifts.append((abs(across) if place[0] - axes.left < 40 else across, far * math.sin(turn)))
    return shifts


def _mark(axes: _Axes, point: Point, shift: tuple[float, float]) -> str:
    """One row: whiskers as one path, and a point, hollow where the verdict isn't firm."""
    x, left, right = map(axes.x, point.x)
    y = axes.foot - 10 if point.y is None else axes.y(point.y[0])
    path = f"M{left:.1f} {y:.1f}H{right:.1f}"
    if point.y:
        path += f"M{x:.1f} {axes.y(point.y[2]):.1f}V{axes.y(point.y[1]):.1f}"
    color = COLORS[point.color]
    fill = (
        f'class="dot" fill="{color}"'
        if point.firm
        else f'class="hollow" fill="#fff" stroke="{color}" stroke-width="2"'
    )
    return (
        f'<g class="point {point.color}" data-row="{point.place}" data-text="{html.escape(point.text)}">'
        f'<path class="whisker" d="{path}" stroke="{color}" stroke-width="1.4" stroke-opacity=".45" fill="none"/>'
        f'<circle {fill} cx="{x + shift[0]:.1f}" cy="{y + shift[1]:.1f}" r="5"/></g>'
    )


def _labels(axes: _Axes, points: Sequence[Point]) -> Iterable[str]:
    """Names beside the points that aren't firmly fine, where there is room."""
    taken: list[tuple[float, float, float]] = []
    for point in [point for point in points if point.color != "good" or not point.firm][:LABELS]:
        x, y = axes.x(point.x[0]), axes.foot - 10 if point.y is None else axes.y(point.y[0])
        name, wide = (
            point.name if len(point.name) <= 32 else f"{point.name[:31]}…",
            7.2 * min(len(point.name), 32),
        )
        for side, down in ((1, -7), (1, 15), (-1, -7), (-1, 15)):
            start = x + 8 if side == 1 else x - 8 - wide
            free = all(
                abs(y + down - other) > 12 or start > end or start + wide < begin
                for begin, end, other in taken
            )
            if free and start > axes.left and start + wide < axes.left + axes.inner + 10:
                taken.append((start, start + wide, y + down))
                yield words(
                    start, y + down, name, "start", f'class="name" data-row="{point.place}"', "#1a1c20"
                )
                break
