"""A language model's answers: the captions in them, and which of those can be anchor prompts. Answers are never trusted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS

LENGTHS = (3, 300)  # characters of a prompt, at least and at most
NUMBERING = re.compile(
    r"(?:[-*•–—+·>]+|\(?\d{1,4}[.):](?!\d)|\d{1,4}\s+[-–—](?=\s)|#\d+[.:]?"
    r"|(?:caption|prompt|picture|image)\s*(?:#?\d+\s*[.):-]|:))\s*",
    re.IGNORECASE,
)
CHATTER = re.compile(
    r"(?:sure|certainly|okay|ok|of course|absolutely|great)\b\s*[,!.:]"
    r"|(?:here(?:'s|’s| is| are)|below (?:are|is)|these are|let me know|feel free|i hope|i can|i'm|i’m|i am|note:)\b"
    r"|enjoy\b\W*$|```|<\|",
    re.IGNORECASE,
)
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "*": "*", "_": "_"}


def parse_answer(text: str, cut: bool = False) -> list[str]:
    """The captions in a model's answer: one a line, or a JSON list, without numbers, bullets and quotes.

    What an answer says around its captions is left out, and so is the last one when the answer is `cut`.
    """
    text = text.rpartition("</think>")[2]  # a reasoning model thinks aloud first
    if listed := re.search(r"\[\s*[\"{\[].*", text, re.DOTALL):
        lines, cut = _json_strings(listed[0]), False  # a string without its end is none
    else:
        lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[:-1] if cut else lines
    return [caption for line in lines if (caption := _clean(line))]


def _json_strings(text: str) -> list[str]:
    """The strings of the JSON value that `text` starts with, or of as much of it as there is."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        whole = re.finditer(r'("(?:[^"\\\n]|\\.)*")(\s*:)?', text)
        value = [json_or_none(match[1]) for match in whole if not match[2]]
    parts, strings = [value], []
    while parts:
        part = parts.pop(0)
        if isinstance(part, str):
            strings.append(part)
        elif isinstance(part, list | dict):
            parts[:0] = part if isinstance(part, list) else part.values()
    return strings


def json_or_none(text: str) -> str | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _clean(line: str) -> str:
    """A line without what is no part of its caption; empty if the line is no caption."""
    line = " ".join(line.split())
    before = None
    while line != before:
        before = line
        line = line.rstrip(",;. ")
        if len(line) > 1 and QUOTES.get(line[0]) == line[-1]:
            line = line[1:-1].strip()
        elif numbered := NUMBERING.match(line):
            line = line[numbered.end() :]
    return "" if line.endswith(":") or CHATTER.match(line) or line.startswith("#") else line


class Collector:
    """The prompts found so far, `prompts`, and why others were refused."""

    def __init__(self, kind: str, anchor: str, targets: Sequence[str]) -> None:
        self.kind, self.anchor, self.targets = (
            KINDS[kind],
            anchor,
            [target for target in targets if target.strip()],
        )
        self.prompts: list[str] = []
        self.refused: Counter[str] = Counter()
        self._seen: set[str] = set()

    def add(self, prompts: Sequence[str]) -> int:
        """Keep those of `prompts` that can be anchor prompts; returns how many."""
        before = len(self.prompts)
        for prompt in prompts:
            if reason := self._refusal(prompt):
                self.refused[reason] += 1
            else:
                self.prompts.append(prompt)
            self._seen.add(_letters(prompt))
        return len(self.prompts) - before

    def _refusal(self, prompt: str) -> str | None:
        if not LENGTHS[0] <= len(prompt) <= LENGTHS[1]:
            return f"not of {LENGTHS[0]} to {LENGTHS[1]} characters"
        if not prompt.isprintable():
            return "with control characters"
        if _letters(prompt) in self._seen:
            return "repeated"
        if any(self._holds(prompt, target) for target in self.targets):
            return "with a target in it"
        if self.kind.needs_anchor_word and not has_word(prompt, self.anchor):
            return f"without the anchor {self.anchor!r}"
        return None

    def _holds(self, prompt: str, target: str) -> bool:
        """Whether `prompt` names `target`, hyphens and dots aside; a memorized caption only when it is equal.

        Near paraphrases of a memorized caption may hold it: images decide what they bring back.
        """
        if self.kind.searches_prompts:
            return _letters(prompt) == _letters(target)
        pairs = [(prompt, target)]
        pairs += [(re.sub(r"[^\w\s]|_", gap, prompt), re.sub(r"[^\w\s]|_", gap, target)) for gap in (" ", "")]
        return any(
            has_word(" ".join(text.split()), " ".join(word.split())) for text, word in pairs if word.strip()
        )

    def refusals(self) -> str:
        """How many prompts were refused for which reason, as one line."""
        return ", ".join(f"{number} {reason}" for reason, number in self.refused.most_common()) or "none"


def _letters(prompt: str) -> str:
    """What makes two prompts the same: their letters and digits, in any case."""
    return "".join(char for char in prompt.casefold() if char.isalnum())
