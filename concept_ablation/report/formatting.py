"""How the report writes numbers: shares, points, metrics."""

from concept_ablation.common.score_table import SHARES


def share(value: float | None) -> str:
    """0.034 -> "3%"."""
    return "–" if value is None else f"{100 * value:.0f}%"


def points(value: float | None) -> str:
    """A change of a share in percentage points: -0.034 -> "−3.4"."""
    return "–" if value is None else _signed(100 * value, 1)


def format_metric(value: float | None, metric: str, change: bool = False) -> str:
    """A value of the long table as the page shows it."""
    if value is None:
        return "–"
    if metric in SHARES:
        return points(value) if change else share(value)
    digits = 3 if metric != "kid_x1000" else 0 if abs(value) >= 100 else 1
    return _signed(value, digits) if change else _signed(value, digits).removeprefix("+")


def _signed(value: float, digits: int) -> str:
    """With a sign, a true minus, and no sign where it rounds to zero."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
