"""The roles of a row's probes, and how the tables name what is pooled or chosen among them."""

from __future__ import annotations

from collections.abc import Mapping

PARAPHRASES = "paraphrases of {}"
"""Subject of the probe that asks for a target in other words."""

POOLS = {"target": "targets", "neighbor": "neighbors"}
"""Role (and probe name) of all images of a role taken together: all targets, all neighbors."""

WORST = "worst neighbor"
"""Role of the neighbor that lost most of its typical images, once more, with intervals corrected for choosing it."""


def is_pooled(role: str) -> bool:
    """Whether lines of this role hold images that lines of their own probes hold, too: a mean over both counts them twice."""
    return role == WORST or role in POOLS.values()


def probe_roles(row: Mapping) -> list[tuple[str, str]]:
    """Role and subject of each probe of a row, in their order: a mapping with targets, anchor, neighbors and paraphrases.

    `paraphrases` may be missing; they are the subjects of probes that ask for a target in other words.
    """
    subjects = {
        "target": row["targets"],
        "paraphrase": row.get("paraphrases", ()),
        "anchor": [row["anchor"]],
        "neighbor": row["neighbors"],
    }
    return [(role, subject) for role, names in subjects.items() for subject in names]
