"""The roles of a row's probes, and the tables' names for pooled and chosen probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PARAPHRASES = "paraphrases of {}"
"""Subject of the probe that asks for a target in other words; `{}` is the target."""

POOLS = {"target": "targets", "neighbor": "neighbors"}
"""Role -> the role, and probe name, of all its images pooled: all targets, all neighbors."""

WORST = "worst neighbor"
"""Role of the neighbor that lost most typical images. It is listed again, with intervals corrected for the choice."""

MARK = "<learned>"
"""Where a prompt has what an attack learned, in any case of its letters."""

LANES = {"target": ("target", "paraphrase", "anchor"), "neighbor": ("neighbor",)}
"""The roles whose probes are drawn in step where pictures are added in looks: what is compared or pooled has as many looks."""


def planned_looks(probes: Iterable[Mapping], look: int) -> dict[str, int]:
    """Role -> the most looks at its lane's probes, each of which has a `role` and at most `images` pictures, `look` of them a look."""
    most: dict[str, int] = {}
    for probe in probes:
        most[probe["role"]] = max(most.get(probe["role"], 0), -(-probe["images"] // look))
    return {
        role: max(most.get(other, 0) for other in roles)
        for roles in LANES.values()
        for role in roles
        if role in most
    }


def is_pooled(role: str) -> bool:
    """Whether lines of this role hold images that lines of their own probes hold, too: a mean over both counts them twice."""
    return role == WORST or role in POOLS.values()


def probe_roles(row: Mapping) -> list[tuple[str, str]]:
    """Role and subject of each probe of a row, in order. `row`: a mapping with targets, anchor, neighbors, paraphrases.

    `paraphrases` may be missing. They are the subjects of the probes that ask for a target in other words.
    """
    subjects = {
        "target": row["targets"],
        "paraphrase": row.get("paraphrases", ()),
        "anchor": [row["anchor"]],
        "neighbor": row["neighbors"],
    }
    return [(role, subject) for role, names in subjects.items() for subject in names]
