"""Read captions from a language model's answers, which aren't trusted, and keep those that can be anchor prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS

LENGTHS = (3, 300)  # fewest and most characters of a prompt
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
    """The captions in a model's answer, which has one per line or a JSON list. Numbers, bullets and quotes are removed.

    Text around the captions is left out. So is the last caption of an answer that was `cut` at its length limit.
    """
    text = text.rpartition("</think>")[2]  # a reasoning model writes its thoughts first
    if listed := re.search(r"\[\s*[\"{\[].*", text, re.DOTALL):
        lines, cut = _json_strings(listed[0]), False  # an unfinished JSON string is not read anyway
    else:
        lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[:-1] if cut else lines
    return [caption for line in lines if (caption := _clean(line))]


def _json_strings(text: str) -> list[str]:
    """The strings in the JSON value that `text` starts with; if it was cut off, those that are whole."""
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
    """The caption in a line, without number, bullet and quotes; empty if the line is not a caption."""
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
    """The prompts kept so far (`prompts`) and the counts of the refused ones by reason (`refused`)."""

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
        """Keep those of `prompts` that can be anchor prompts; returns their number."""
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
        """Whether `prompt` names `target`, apart from hyphens and dots. A memorized caption has to equal the prompt.

        A paraphrase may contain a memorized caption: its images decide whether it reproduces the picture.
        """
        if self.kind.searches_prompts:
            return _letters(prompt) == _letters(target)
        pairs = [(prompt, target)]
        pairs += [(re.sub(r"[^\w\s]|_", gap, prompt), re.sub(r"[^\w\s]|_", gap, target)) for gap in (" ", "")]
        return any(
            has_word(" ".join(text.split()), " ".join(word.split())) for text, word in pairs if word.strip()
        )

    def refusals(self) -> str:
        """One line: how many prompts were refused for each reason."""
        return ", ".join(f"{number} {reason}" for reason, number in self.refused.most_common()) or "none"


def _letters(prompt: str) -> str:
    """The letters and digits of a prompt, case folded: prompts that share them count as the same."""
    return "".join(char for char in prompt.casefold() if char.isalnum())
