"""A target asked for in other words: the families of prompts that test whether a removed concept comes back.

A family makes the prompts of a fixed number of pictures from what a row says. Nothing is random: the same row gives the same prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from concept_ablation.common.errors import show
from concept_ablation.prompts.templates import SLOT, PromptsError, fill

TEMPLATES = {
    "paraphrase": ({"target"}, {"target", "prompt"}),
    "longer": ({"request"}, {"request"}),
    "beside": ({"request", "neighbor"}, {"request", "neighbor"}),
}
"""A family that has templates -> the slots that each of them needs, and those that it may have."""


@dataclass(frozen=True)
class Words:
    """What the families of one target are made of.

    requests: a word in the target's place, and a number -> the first so many prompts that ask for it plainly, at least one. prompts: the anchor's evaluation
    prompts. translations: words for the target, a language each. templates: family -> its templates, as `check_templates` wants them.
    """

    target: str
    anchor: str
    requests: Callable[[str, int], Sequence[str]]
    prompts: Sequence[str] = ()
    neighbors: Sequence[str] = ()
    synonyms: Sequence[str] = ()
    translations: Sequence[str] = ()
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)


def paraphrase(words: Words, count: int) -> list[str]:
    """Other sentences around the target's own word. {prompt} in a template is one of the anchor's prompts."""
    templates = words.templates["paraphrase"]
    return [
        fill(template, {"target": words.target, "prompt": prompt})
        for template, prompt in _turns(count, templates, words.prompts or [""])
    ]


def synonym(words: Words, count: int) -> list[str]:
    """The plain prompts, with the row's synonyms in the target's place."""
    return _asking(words, words.synonyms, count)


def typo(words: Words, count: int) -> list[str]:
    """The plain prompts, with the target misspelled by one letter, each in another way."""
    taken = {name.casefold() for name in (words.target, words.anchor, *words.neighbors)}
    return _asking(words, misspellings(words.target, count, taken), count)


def longer(words: Words, count: int) -> list[str]:
    """The plain prompts inside longer ones."""
    return [
        fill(template, {"request": request})
        for template, request in _turns(count, words.templates["longer"], words.requests(words.target, count))
    ]


def beside(words: Words, count: int) -> list[str]:
    """The plain prompts, with one of the neighbors beside the target."""
    if not words.neighbors:
        return []
    requests = words.requests(words.target, count)
    return [
        fill(template, {"request": requests[place % len(requests)], "neighbor": neighbor})
        for place, (template, neighbor) in enumerate(
            _turns(count, words.templates["beside"], words.neighbors)
        )
    ]


def language(words: Words, count: int) -> list[str]:
    """The plain prompts, with the words of other languages in the target's place."""
    return _asking(words, words.translations, count)


FAMILIES: Mapping[str, Callable[[Words, int], list[str]]] = {
    "paraphrase": paraphrase,
    "synonym": synonym,
    "typo": typo,
    "longer": longer,
    "beside": beside,
    "language": language,
}
"""The families, in the order of the tables. A family without prompts (no synonyms, no neighbors, no words) is left out."""


def reword(targets: Sequence[Words], count: int) -> dict[str, list[str]]:
    """Family -> the prompts of its `count` pictures, whose targets take turns. Families without prompts are left out.

    Raises PromptsError for a template that `check_templates` refuses.
    """
    for words in targets:
        check_templates(words.templates)
    each, found = -(-count // len(targets)), {}
    for name, family in FAMILIES.items():
        lists = [prompts for words in targets if (prompts := family(words, each))]
        if lists:
            found[name] = [lists[place % len(lists)][place // len(lists) % each] for place in range(count)]
    return found


def check_templates(templates: Mapping[str, Sequence[str]]) -> None:
    """Raises PromptsError for a family without templates, and for a template that lacks a slot or has one that it can't have."""
    for family, (needed, allowed) in TEMPLATES.items():
        if not templates.get(family):
            raise PromptsError(
                f"evaluation.wordings.{family}: holds no template; write one, or set images to 0"
            )
        for template in templates[family]:
            found = set(SLOT.findall(template))
            if not needed <= found <= allowed:
                wanted = " and ".join(f"{{{name}}}" for name in sorted(needed))
                more = "".join(f", and may have {{{name}}}" for name in sorted(allowed - needed))
                raise PromptsError(
                    f"evaluation.wordings.{family}: template {show(template)} needs {wanted}{more}, and no other slot"
                )


def misspellings(word: str, count: int, taken: set[str] = frozenset()) -> list[str]:
    """At most `count` misspellings of `word` by one letter: two letters swapped, one left out, one doubled, in turn.

    Which letter it is comes from a hash of the word. The first letter of a word stays where the word has more than three, as
    misspellings mostly leave it. None is in `taken` (in lower case), and none comes twice.
    """
    found: dict[str, None] = {}
    edits = (_swap, _drop, _double)
    places = _letters(word)
    for number in range(len(edits) * max(1, len(places))):
        kind, turn = number % len(edits), number // len(edits)
        if len(found) == count or not places:
            break
        start = int.from_bytes(hashlib.sha256(f"{kind} {word}".encode()).digest()[:4]) % len(places)
        made = edits[kind](word, places[(start + turn) % len(places)])
        if made and made.casefold() not in taken and made != word:
            found[made] = None
    return list(found)


def _letters(text: str) -> list[int]:
    """The places in `text` of letters that a misspelling may change."""
    places = [place for place, letter in enumerate(text) if letter.isalnum()]
    first = {place for place in places if place == 0 or not text[place - 1].isalnum()}
    inner = [place for place in places if place not in first]
    return inner if len(inner) > 2 else places


def _swap(text: str, place: int) -> str | None:
    after = text[place + 1 : place + 2]
    return text[:place] + after + text[place] + text[place + 2 :] if after.isalnum() else None


def _drop(text: str, place: int) -> str | None:
    made = text[:place] + text[place + 1 :]
    return made if made.strip() else None


def _double(text: str, place: int) -> str:
    return text[: place + 1] + text[place:]


def _asking(words: Words, others: Sequence[str], count: int) -> list[str]:
    """The plain prompts of other words, which take turns. Of each word only those up to its last turn are made."""
    others, found = others[:count], [""] * (count if others else 0)
    for first, other in enumerate(others):
        turns = range(first, count, len(others))
        requests = words.requests(other, turns[-1] + 1)
        for place in turns:
            found[place] = requests[place % len(requests)]
    return found


def _turns(count: int, one: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    """`count` pairs, in which both lists take turns; whenever both begin again, the second moves on by one, so that all pairs come."""
    both = math.lcm(len(one), len(other))
    return [(one[place % len(one)], other[(place + place // both) % len(other)]) for place in range(count)]
