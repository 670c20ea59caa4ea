"""What a reader has to look at first: how each row stands, which value decides it, how many more pictures would settle it.

docs/report.md states the formula. The verdict itself is `verdict.decide`'s; nothing is decided here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from concept_ablation import verdict
from concept_ablation.common.roles import WORST
from concept_ablation.verdict import Decision, Thresholds

VERDICT_COLORS = {
    verdict.KEPT: "good",
    verdict.ALONE: "good",
    verdict.HARMED: "warn",
    verdict.ANCHOR_HARMED: "warn",
    verdict.ONE_HARMED: "warn",
    verdict.PRESENT: "bad",
}
"""Colour of a verdict; the inconclusive ones are neutral."""

State = Literal["failed", "provisional", "firm"]
STATES: dict[State, str] = {
    "failed": "the target is still there, or something else was harmed",
    "provisional": "no harm measured, but more pictures could change the verdict",
    "firm": "removed, the rest intact, and the intervals agree",
}
"""How a row stands, worst first -> what that means."""

RANKS = {"bad": 0, "warn": 1, "open": 2, "good": 3}
"""Colour of a verdict -> its place when the worst come first."""


class Question(NamedTuple):
    """A measured value beside its limit. subject: whose it is; column: its columns of the summary, `<column>_change`, or "target".

    images: how many pictures it was measured on, None: not known.
    """

    about: str
    subject: str
    column: str
    decision: Decision
    images: int | None

    @property
    def urgency(self) -> float:
        """How far the value lies beyond its limit, in half widths of its interval; negative: within."""
        return self.decision.excess / max(self.decision.half_width, 1e-6)


class Standing(NamedTuple):
    """How a row stands. deciding: the value that decides it; open: the one that needs most pictures, None for a firm verdict.

    more: about how many more pictures would settle `open`, `pictures_needed`; order: rows sorted by it have the worst first.
    """

    state: State
    deciding: Question
    open: Question | None
    more: int | None
    order: tuple


def standing(line: Mapping, limits: Thresholds, images: Mapping[str, int | None]) -> Standing:
    """How the row of a summary's line stands. images: role (`target`, `neighbor`, `worst_neighbor`, `anchor`) -> pictures behind its value."""
    color, questions = VERDICT_COLORS.get(line["verdict"], "open"), _questions(line, limits, images)
    state = state_of(line)
    beyond = [question for question in questions if not question.decision.within]
    deciding = max(beyond or questions, key=lambda question: question.urgency)
    unsettled = [question for question in questions if not question.decision.settled]
    needed = {question: pictures_needed(question.decision, question.images) for question in unsettled}
    hardest = max(unsettled, key=lambda question: needed[question] or math.inf, default=None)
    firm = line["firmness"] == "firm"
    if firm or line["verdict"] == verdict.NOT_SHOWN:
        hardest = None
    return Standing(
        state,
        deciding,
        hardest,
        hardest and needed[hardest],
        (list(STATES).index(state), RANKS[color], firm == (state != "failed"), -deciding.urgency),
    )


def state_of(line: Mapping) -> State:
    """A line's state: failed where the measured values say so, provisional where they are fine or open but not settled, else firm."""
    color = VERDICT_COLORS.get(line["verdict"], "open")
    if color in ("bad", "warn"):
        return "failed"
    return "firm" if color == "good" and line["firmness"] == "firm" else "provisional"


def count_states(lines: Sequence[Mapping]) -> dict[State, int]:
    """How many rows stand in each state, the worst first."""
    found = [state_of(line) for line in lines]
    return {state: found.count(state) for state in STATES}


def pictures_needed(decision: Decision, images: int | None, most: float = 1e5) -> int | None:
    """About how many more pictures would bring the interval off its limit, if the value stays; 0 where it is off already.

    An interval of n pictures reaches h from its value towards the limit, and that shrinks as 1 / sqrt(n). With the limit at a
    distance d it takes n (h / d)^2 pictures. None: unknown, or more than `most`, as where the value lies on its limit.
    """
    if decision.settled:
        return 0
    reach = decision.high - decision.excess if decision.within else decision.excess - decision.low
    distance = abs(decision.excess)
    if not images or reach > distance * math.sqrt(most / images):
        return None
    return max(1, math.ceil(images * (reach / distance) ** 2 - 1e-9) - images)


def rounded_up(count: int) -> int:
    """A number of pictures to two digits, upwards: 1234 -> 1300. More would promise too much."""
    scale = 10 ** max(0, len(str(count)) - 2)
    return -(-count // scale) * scale


def worst_neighbor_images(scores: pa.Table) -> dict[str, int]:
    """Concept -> pictures of its worst neighbor, from the long table."""
    chosen = pc.and_(pc.equal(scores["role"], WORST), pc.equal(scores["metric"], "typical"))
    lines = scores.filter(pc.and_(chosen, pc.equal(scores["side"], "difference")))
    return dict(zip(lines["concept"].to_pylist(), lines["n"].to_pylist(), strict=True))


def _questions(line: Mapping, limits: Thresholds, images: Mapping[str, int | None]) -> list[Question]:
    """The values that enter the verdict, as `verdict.decide` takes them: what was spared matters only once the target is gone."""
    excess = (line[f"target_excess{end}"] for end in ("", "_low", "_high"))
    target = Decision.of(*excess, 0.0, "at most")
    found = [Question("target", line["deciding_target"], "target", target, images.get("target"))]
    for about, subject, role, metric, most in (
        ("neighbors", "all neighbors", "neighbor", "recognition", limits.neighbor_loss_max),
        ("worst neighbor", line.get("worst_neighbor"), "worst_neighbor", "typical", limits.worst_neighbor_loss_max),
        ("anchor", line["anchor"], "anchor", "typical", limits.anchor_loss_max),
    ):  # fmt: skip
        column = f"{role}_{metric}"
        values = [line.get(f"{column}_change{end}") for end in ("", "_low", "_high")]
        if target.within and values[0] is not None:
            found.append(Question(about, subject, column, Decision.of(*values, -most, "at least"), images.get(role)))  # fmt: skip
    return found
