"""Interference: which subjects of other rows every row's model is measured on, and that work.

A *victim* is a target or a neighbor of other rows. It is drawn with the prompts and seeds that its own row has, so the base model's
pictures are there already. What a row draws itself is taken from its own pictures.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import Plan, PlanError, Row
from concept_ablation.plan.victims import Interference, Victim
from concept_ablation.prompts.encodings import Alphabet, choose_nearest, encode_words
from concept_ablation.registries import KINDS

MOST = 100_000
"""Cells of a matrix that `all` may ask for: they grow with the table's square, so it is for small ones."""

Name = tuple[
    str, bool
]  # how subjects are told apart: by name, and by whether they are added to another prompt, as styles are


class Named(NamedTuple):
    """A row that names a subject, with the subject's role there and as the row spells it."""

    row: Row
    role: str
    subject: str


def plan_interference(plan: Plan, rows: Sequence[tuple[Row, Mapping]], model: Mapping) -> None:
    """Sort a plan's rows by name, and add to each what measures its model on subjects of other rows.

    rows: each with its settings `evaluation`. A row that is switched off is no victim. Raises PlanError.
    """
    rows = sorted(rows, key=lambda judged: judged[0].concept.name)
    subjects = _subjects(row for row, _ in rows if row.concept.enabled)
    asked = [own["interference"] for _, own in rows]
    if (cells := asked.count("all") * len(subjects)) > MOST:
        raise PlanError(
            f"config: evaluation.interference: all would measure {cells:,} pairs of a row and a subject (allowed: {MOST:,}; or "
            "set near, which grows with the number of rows)"
        )
    places = [place for place, mode in enumerate(asked) if mode == "near"] if subjects else []
    counts = [rows[place][1]["interference_nearest"] for place in places]
    near = _near([rows[place][0] for place in places], counts, subjects, model)
    chosen = dict(zip(places, near, strict=True))
    plan.rows = [
        _with_victims(plan, row, subjects, chosen.get(place, subjects), own["images"]["victim"], model)
        if own["interference"] != "none"
        else row
        for place, (row, own) in enumerate(rows)
    ]


def _name(concept: Concept, role: str, subject: str) -> Name:
    return subject.casefold(), role in KINDS[concept.kind].added_roles


def _own(concept: Concept, anchor: bool = True) -> Iterator[tuple[Name, str, str]]:
    """What a row draws: name, role and subject."""
    roles = [("target", target) for target in concept.targets]
    roles += [("neighbor", neighbor) for neighbor in concept.neighbors]
    for role, subject in [*roles, ("anchor", concept.anchor)][: None if anchor else -1]:
        yield _name(concept, role, subject), role, subject


def _subjects(rows: Iterator[Row]) -> dict[Name, list[Named]]:
    """All subjects of the table, in the order of their names, each with the rows that name it; those that remove it stand first."""
    found: dict[Name, list[Named]] = {}
    for row in rows:
        for name, role, subject in _own(row.concept, anchor=False):
            found.setdefault(name, []).append(Named(row, role, subject))
    for named in found.values():
        named.sort(key=lambda one: one.role != "target")
    return dict(sorted(found.items()))


def _near(
    rows: Sequence[Row], counts: Sequence[int], subjects: Mapping[Name, Sequence[Named]], model: Mapping
) -> list[list[Name]]:
    """For each row the nearest subjects of rows with its kind and anchor, then as many of all others."""
    if not rows:
        return []
    names, groups = list(subjects), {}
    places = {name: place for place, name in enumerate(names)}
    for name, named in subjects.items():
        for row, *_ in named:
            groups.setdefault((row.concept.kind, row.concept.anchor), {})[places[name]] = None
    # What a row that is switched off removes may be no subject: its place in the alphabet stands for it.
    targets = [
        [
            min(bisect_left(names, name), len(names) - 1)
            for name, role, _ in _own(row.concept)
            if role == "target"
        ]
        for row in rows
    ]
    peers = [list(groups.get((row.concept.kind, row.concept.anchor), ())) for row in rows]
    taken = [[places[name] for name, *_ in _own(row.concept) if name in places] for row in rows]
    local = os.path.isdir(model["path"])
    words = [named[0].subject for named in subjects.values()]
    near = (encode_words(model["path"], words) if local else None) or Alphabet(len(names))
    chosen = choose_nearest(near, targets, peers, taken, counts)
    return [[names[place] for place in own] for own in chosen]


def _with_victims(
    plan: Plan,
    row: Row,
    subjects: Mapping[Name, Sequence[Named]],
    chosen: Collection[Name],
    images: int,
    model: Mapping,
) -> Row:
    """A row with what measures its model on `chosen`, and on other rows' subjects that it draws itself."""
    own = {name: (role, subject) for name, role, subject in reversed(list(_own(row.concept)))}
    until = plan.specs["sample_ablated"][row.samples].get("until")
    least = until["look"] if until else images  # of its own pictures the first look is sure to be there
    victims, works = [], []
    for name in dict.fromkeys([*(name for name in own if name in subjects), *chosen]):
        probed, named = own.get(name), subjects[name]
        home = next((one for one in named if one.row is not row), None)
        if home and not (probed and probed[0] == "target"):
            others = len(named) - (row.concept.enabled and bool(probed) and probed[0] == "neighbor")
            base = row.base[probed[1]] if probed else home.row.base[home.subject]
            concept = home.row.concept
            victim = Victim(home.subject, concept.name, concept.kind, home.role, others, base, probed)
            works.append(_work(plan, home.row, victim, min(images, least) if probed else images))
            victims.append(victim)
    if not victims:
        return row
    judged = plan.specs["score_concept"][row.scores]
    spec = {
        "model": model,
        "delta": row.ablation,
        "samples": row.samples if any(victim.probed for victim in victims) else None,
        "base": [victim.base for victim in victims],
        "victims": works,
        "scorer": judged["scorer"],
        "statistics": judged["statistics"],
    }
    key = plan.add("measure_interference", row.concept.name, spec)
    return replace(row, interference=Interference(key, tuple(victims)))


def _work(plan: Plan, home: Row, victim: Victim, images: int) -> dict:
    """A victim's part of a spec: it is recognised among the subjects of the row that it is from."""
    drawn = plan.specs["sample_base"][victim.base]["probe"]["images"]
    texts = plan.specs["score_concept"][home.scores]["texts"]
    named = [*home.concept.targets, *home.concept.neighbors]
    return {
        "subject": victim.subject,
        "texts": {subject: texts[subject] for subject in named},
        "images": min(drawn, images),
        "probed": list(victim.probed) if victim.probed else None,
    }
