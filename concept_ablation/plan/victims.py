"""What a row's model is measured on beside the row's own subjects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Victim:
    """A subject of other rows that a row's model is measured on.

    row: the name of the first of them, which removes it if one does; kind, role: that row's, and target or neighbor; rows: how many name
    it; base: the key of the base model's pictures; probed: role and subject with which the measured row draws it itself, if it does.
    """

    subject: str
    row: str
    kind: str
    role: str
    rows: int
    base: str
    probed: tuple[str, str] | None = None


@dataclass(frozen=True)
class Interference:
    """The key of what measures a row's model on subjects of other rows, and these, in the order of its table."""

    key: str
    victims: tuple[Victim, ...]
