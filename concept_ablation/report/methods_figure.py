"""The figure of methods side by side: a panel a measure, a line a method, a mark a target."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import markupsafe

from concept_ablation.report.figures import COLORS
from concept_ablation.report.methods import Measure, MethodRows, cell, compare_methods, measures_of

WIDTH, STEP, TOP, LEFT, GAP = 118, 30, 48, 128, 34
"""Of a panel, in pixels: its width, a method's height, the room above, that for the names, that between panels."""


def shown_methods(rows: Sequence[Mapping], lines: Sequence[Mapping]) -> dict:
    """What the page's template is filled with for methods side by side; see `methods.compare_methods`."""
    methods = compare_methods(rows, lines)
    return {
        "methods": methods,
        "method_measures": measures_of(methods),
        "method_cell": cell,
        "methods_figure": markupsafe.Markup(methods_figure(methods)),
    }


def methods_figure(methods: Sequence[MethodRows]) -> str:
    """An SVG: of each method and measure the rows' values (hollow: the target isn't gone), their mean and its 95 % interval.

    Lower is better in every panel. Names are escaped. Empty without methods.
    """
    measures = measures_of(methods)
    if not measures:
        return ""
    width = LEFT + len(measures) * (WIDTH + GAP) + 8
    height = TOP + STEP * len(methods) + 58
    head = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="11"'
    label = "Methods by measure: targets, their mean and its interval; lower is better"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {head} aria-label="{label}" font-family="system-ui, sans-serif" fill="currentColor">'
    ]
    for place, method in enumerate(methods):
        y, color = _line(place), COLORS[place % len(COLORS)]
        parts.append(f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end" font-weight="600" fill="{color}">{html.escape(method.name)}</text>')  # fmt: skip
    for number, measure in enumerate(measures):
        parts += _panel(LEFT + number * (WIDTH + GAP), measure, methods)
    y = TOP + STEP * len(methods) + 48
    parts += [
        f'<circle cx="{LEFT + 5}" cy="{y - 4}" r="3" fill="currentColor" fill-opacity=".35"/><text x="{LEFT + 14}" y="{y}">a target that is gone</text>',
        f'<circle cx="{LEFT + 145}" cy="{y - 4}" r="2.5" fill="none" stroke="currentColor" stroke-opacity=".5"/><text x="{LEFT + 154}" y="{y}">one that is not: counted on the left and in seconds alone</text>',
        f'<path d="M{LEFT + 480} {y - 4}h22" stroke="currentColor" stroke-width="2"/><circle cx="{LEFT + 491}" cy="{y - 4}" r="4.5" fill="currentColor"/><text x="{LEFT + 509}" y="{y}">mean, 95 % interval over targets</text>',
    ]
    return "\n".join([*parts, "</svg>"])


def _line(place: int) -> float:
    return TOP + STEP * (place + 0.5)


def _panel(x0: float, measure: Measure, methods: Sequence[MethodRows]) -> list[str]:
    """One measure's title, axis and marks."""
    scale = _Scale(measure, [value for method in methods for value in method.values(measure, all_rows=True)])
    bottom, parts = TOP + STEP * len(methods), []
    for number, line in enumerate(_wrapped(measure.title)):
        parts.append(f'<text x="{x0}" y="{14 + 13 * number}" font-weight="600">{html.escape(line)}</text>')
    for value, text in scale.ticks:
        x = x0 + WIDTH * scale.place(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="currentColor" stroke-opacity="{0.4 if value == 0 else 0.15}"/>')  # fmt: skip
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill-opacity=".8">{text}</text>')  # fmt: skip
    for place, method in enumerate(methods):
        parts += _marks(x0, _line(place), scale, measure, method, COLORS[place % len(COLORS)])
    return parts


def _marks(x0: float, y: float, scale: _Scale, measure: Measure, method: MethodRows, color: str) -> list[str]:
    """The marks of one method in one panel."""
    parts = []
    for number, line in enumerate(method.lines):
        value = line.get(measure.column)
        if value is None:
            continue
        x, shift = x0 + WIDTH * scale.place(measure.sign * value), 3.2 * (number % 5 - 2)
        filled = (
            f'fill="{color}" fill-opacity=".35"'
            if line["removed"]
            else f'fill="none" stroke="{color}" stroke-opacity=".6"'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{y + shift:.1f}" r="{3 if line["removed"] else 2.5}" {filled}><title>{html.escape(line["concept"])}</title></circle>')  # fmt: skip
    found = method.mean(measure)
    if found:
        mean, low, high = found
        if not math.isnan(low):
            ends = [x0 + WIDTH * scale.place(end) for end in (low, high)]
            parts.append(f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x0 + WIDTH * scale.place(mean):.1f}" cy="{y}" r="4.5" fill="{color}"/>')
    return parts


class _Scale:
    """Where a value stands on a panel, 0 to 1: shares from a little below 0 to 100 %, numbers to a round one, seconds by ratio."""

    def __init__(self, measure: Measure, values: Sequence[float]) -> None:
        self.ratio, most = measure.unit == "seconds", max(values, default=1.0)
        least = min(values, default=0.0)
        if self.ratio:
            self.low = math.floor(math.log10(max(least, 1e-3)))
            self.high = max(math.ceil(math.log10(max(most, 1e-3))), self.low + 1)
            tens = range(self.low, self.high + 1)
            self.ticks = [(10.0**n, f"{10.0**n:g}") for n in tens if (n - self.low) % (1 + len(tens) // 5) == 0]  # fmt: skip
            return
        if measure.unit == "share":
            self.high = next(top for top in (0.1, 0.2, 0.5, 1.0) if most <= top or top == 1.0)
            self.low = min(-0.05 * self.high, max(least, -self.high))
            self.ticks = [(share, f"{share:.0%}") for share in (0.0, self.high / 2, self.high)]
            return
        step = 10.0 ** math.floor(math.log10(max(most, 1.0)))
        # The last tick ends the panel: a mark beyond it would seem to be the next panel's.
        self.low, self.high = min(0.0, least), next(n * step for n in (1, 2, 5, 10) if most <= n * step)
        self.ticks = [(value, f"{value:g}") for value in (0.0, self.high / 2, self.high)]

    def place(self, value: float) -> float:
        value = math.log10(max(value, 1e-3)) if self.ratio else value
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def _wrapped(title: str, most: int = 19) -> list[str]:
    """A title in lines of about `most` characters."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
