"""English words in prompts: articles, plurals, whole words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

ARTICLE = r"(?P<article>\b[Aa]n?\s+)?"


@functools.lru_cache(maxsize=65536)
def with_article(article: str, word: str) -> str:
    """`article` (a, an, A or An) as English wants it before `word`: `an owl`, `a unicorn`, `an r2d2`."""
    first = word.split()[0].lower() if word.split() else ""
    vowel = re.match(r"[aeiou]|hour|honest|heir|[fhlmnrsx]\d|[fhlmnrsx]$", first)
    glide = re.match(r"uni|use|usu|ut[ei]|eu|one\b|once|ufo|ukulele", first)
    return article[0] + ("n " if vowel and not glide else " ")


@functools.lru_cache(maxsize=65536)
def plural(noun: str) -> str:
    """The regular English plural of a noun phrase: `grumpy cat` -> `grumpy cats`."""
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def replace_word(prompt: str, word: str, other: str) -> str:
    """`prompt` with `word` replaced by `other`, as a whole word, in any case. The article before it is corrected.

    A capital first letter, all capitals and a plural carry over. `fisherman` doesn't contain the word `fish`.
    """
    *found, rest = _split(prompt, word)
    made = []
    for before, article, case, is_plural in found:
        new = case(plural(other) if is_plural else other)
        made += [before, with_article(article, new) if article else "", new]
    return "".join(made) + rest


@functools.lru_cache(maxsize=65536)
def _split(prompt: str, word: str) -> tuple:
    """For each `word` in `prompt`: the text before it, its article, what gives another word its case, whether it is a plural; at last the rest.

    Rows that share an anchor put their own words in the same prompts.
    """
    parts, done = [], 0
    for match in _word_pattern(word).finditer(prompt):
        found = match["word"]
        is_plural = found.lower() != word.lower()
        parts.append((prompt[done : match.start()], match["article"], _case_of(found), is_plural))
        done = match.end()
    return (*parts, prompt[done:])


def _case_of(word: str) -> Callable[[str], str]:
    """Gives another word the case of `word`: all capitals, a capital first letter, or as it is."""
    if word.isupper() and len(word) > 1:
        return str.upper
    return (lambda other: other[0].upper() + other[1:]) if word[0].isupper() else str


@functools.lru_cache(maxsize=65536)
def has_word(prompt: str, word: str) -> bool:
    """Whether `prompt` contains `word` or its plural as a whole word, in any case."""
    return _either_form(word).search(prompt) is not None


@functools.lru_cache(maxsize=4096)
def _either_form(word: str) -> re.Pattern:
    """Matches `word` or its plural as a whole word, in any case."""
    words = f"{re.escape(word)}|{re.escape(plural(word))}"
    return re.compile(rf"(?<![\w-])({words})(?![\w-])", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def _word_pattern(word: str) -> re.Pattern:
    """Matches the same, with an article before it if there is one."""
    forms = sorted({word.lower(), plural(word).lower()}, key=len, reverse=True)
    words = "|".join(re.escape(form) for form in forms)
    return re.compile(rf"{ARTICLE}(?<![\w-])(?P<word>{words})(?![\w-])", re.IGNORECASE)
