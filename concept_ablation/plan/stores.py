"""One store of the base model's pictures a subject: a probe of 16 pictures is the start of a probe of 40 of the same prompts and seeds.

A neighbor is often another row's target, of which more pictures are drawn. Then its own store isn't made: whoever reads it reads
the first pictures of the longer one. Keys stay as they are, so a row that is added or removed changes no other row's key. A store
that is there is read as long as it is there, and is the start of a longer one that isn't.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from concept_ablation.plan.graph import Plan, has_content
from concept_ablation.plan.rows import Row


def share_stores(plan: Plan) -> Plan:
    """The plan, in which a neighbor's probe that a longer one begins with is read from that one's store.

    A longer one that isn't there begins with a shorter one that is.
    """
    rows = [*plan.rows, *(row for bundle in plan.bundles for row in bundle.judged)]
    neighbors = _neighbors_alone(rows)
    alike: dict[tuple, list[str]] = {}
    for key, spec in plan.specs["sample_base"].items():
        alike.setdefault((spec["probe"]["subject"], spec["probe"]["seed"]), []).append(key)
    for keys in alike.values():
        if len(keys) > 1:
            _share(plan, keys, neighbors)
    if plan.longer:
        plan.rows = [_renamed(row, plan.longer) for row in plan.rows]
        plan.bundles = [
            replace(bundle, judged=tuple(_renamed(row, plan.longer) for row in bundle.judged))
            for bundle in plan.bundles
        ]
    return plan


def _neighbors_alone(rows: Iterable[Row]) -> set[str]:
    """The keys of what is drawn of neighbors and of nothing else. Who reads pictures of a target or an anchor reads the whole store."""
    neighbors, others = set(), set()
    for row in rows:
        for subject, key in row.base.items():
            (neighbors if subject in row.concept.neighbors else others).add(key)
    return neighbors - others


def _share(plan: Plan, keys: Iterable[str], neighbors: set[str]) -> None:
    specs = plan.specs["sample_base"]
    keys = sorted(keys, key=lambda key: (-specs[key]["probe"]["images"], key))
    there = {key: has_content(plan.path(key)) for key in keys}
    for place, key in enumerate(keys):
        longer = [one for one in keys[:place] if one not in plan.longer and begins(specs[one], specs[key])]
        if there[key]:
            plan.starts |= {one: key for one in longer if not there[one] and one not in plan.starts}
        elif longer and key in neighbors:
            plan.longer[key] = next((one for one in longer if there[one]), longer[0])
    for key in plan.longer.keys() & set(keys):
        del specs[key], plan.stages[key]


def begins(longer: Mapping, shorter: Mapping) -> bool:
    """Whether the pictures of one spec of `sample_base` are the first ones of another's."""
    if any(
        longer.get(name) != shorter.get(name) for name in longer.keys() | shorter.keys() if name != "probe"
    ):
        return False
    one, other = longer["probe"], shorter["probe"]
    first = range(other["images"])
    return (
        one["images"] >= other["images"]
        and (one["subject"], one["seed"]) == (other["subject"], other["seed"])
        and all(_prompt(one, number) == _prompt(other, number) for number in first)
    )


def _prompt(probe: Mapping, number: int) -> str:
    return probe["prompts"][number % len(probe["prompts"])]


def _renamed(row: Row, longer: Mapping[str, str]) -> Row:
    return replace(row, base={subject: longer.get(key, key) for subject, key in row.base.items()})
