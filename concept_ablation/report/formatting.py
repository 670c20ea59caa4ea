"""How the report writes numbers and texts: shares, points, metrics, names in a terminal, settings."""

import json
from collections.abc import Container, Iterator, Mapping

from concept_ablation.registries import METRICS


def share(value: float | None) -> str:
    """0.034 -> "3%"."""
    return "–" if value is None else f"{100 * value:z.0f}%"


def points(value: float | None) -> str:
    """A change of a share in percentage points: -0.034 -> "−3.4"."""
    return "–" if value is None else _signed(100 * value, 1)


def whole_points(value: float) -> str:
    """The same for narrow cells: -0.034 -> "−3"."""
    return _signed(100 * value, 0)


def is_share(metric: str) -> bool:
    """Whether a metric counts images; False for one that isn't registered any more, as in tables of other versions."""
    return metric in METRICS and METRICS[metric].is_share


def format_metric(value: float | None, metric: str, change: bool = False) -> str:
    """A value of the long table as the page shows it."""
    if value is None:
        return "–"
    if is_share(metric):
        return points(value) if change else share(value)
    decimals = METRICS[metric].decimals(value) if metric in METRICS else 3
    return _signed(value, decimals) if change else _signed(value, decimals).removeprefix("+")


def printable(text: str, width: int) -> str:
    """A text for a line of a terminal: no control characters, at most `width` characters."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= width else clean[: width - 3] + "..."


def flat_settings(settings: Mapping, without: Container[str] = ()) -> Iterator[tuple[str, str]]:
    """Nested settings as names (`sampler.steps`) and texts, but for the names in `without`."""
    for key, value in settings.items():
        if key in without:
            continue
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{name}", text) for name, text in flat_settings(value))
        else:
            yield str(key), value if isinstance(value, str) else json.dumps(value)


def _signed(value: float, digits: int) -> str:
    """With a sign, a true minus, and no sign where it rounds to zero."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def duration(seconds: float) -> str:
    """3700 -> "1 h 2 min"; below a minute in seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join([f"{count} {name}" for count, name in parts if count][:2])
