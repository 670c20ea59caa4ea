"""Anchor prompts written by a language model: one on this machine, or one behind an OpenAI-compatible endpoint.

The model is asked for image captions, a few at a time, until there are enough or the budget of requests is
spent. Its answers are never trusted: `parse_answer` takes the captions out of whatever stands around them, and
`Collector` keeps those that can be anchor prompts and counts why the others can't. Every answer is appended to
a file of raw answers as it comes; a later call with the same source starts from the answers in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from concept_ablation.prompts.clients import Answer, Ask, endpoint, local_model
from concept_ablation.prompts.templates import PromptsError
from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS

log = logging.getLogger(__name__)

INSTRUCTIONS = {
    "caption": """\
Write {count} short captions of pictures, for testing a program that draws pictures from text.
Every caption must
- contain the word "{anchor}" or its plural;
- be one line of 4 to 20 words, in plain English, about one thing that can be seen;
- differ from the others: vary the place, the action, the light, the colours, the viewpoint and what else is there.
No caption may mention {targets}, or describe it in other words.
Answer with the captions alone, one a line: no numbers, no quotation marks, no introduction, no remarks.""",
    "paraphrase": """\
A picture has this caption: {targets}
In plain words it is: {anchor}
Write {count} captions that could stand under a picture of the same content. Every caption must
- describe what can be seen, in words of its own, one line of 4 to 25 words;
- not quote the caption above;
- differ from the others: some near to the caption, some far from it, some short, some long.
Answer with the captions alone, one a line: no numbers, no quotation marks, no introduction, no remarks.""",
    "again": "These are written already; write different ones:\n{found}",
}
LENGTHS = (3, 300)  # characters of a prompt, at least and at most
SHOWN = 8  # captions that are shown to the model as already written
# Settings that say how to ask, not what is asked for: answers serve again when these were changed.
MANNERS = ("attempts", "timeout", "device", "key_variable")


def write_by_model(
    source: Mapping,
    *,
    anchor: str,
    kind: str,
    targets: Sequence[str],
    count: int,
    raw_path: str | Path,
    backoff: float = 1.0,
) -> list[str]:
    """`count` anchor prompts by the language model of `source`, in the order in which they were found.

    `source` has one key: `language_model` (see `local_model`) or `endpoint` (see `endpoint`). All requests,
    failed ones too, count towards its `attempts`; after a failed one the wait is `backoff` seconds, doubled
    each time. Raw answers are appended to `raw_path` as JSON lines, and those of the same source, kind, anchor
    and targets that stand there already are used first. Raises PromptsError when the budget is spent, or at
    once when asking again can't help; the message says how many prompts were found.
    """
    maker, settings = _the_source(source)
    if count is None:
        raise PromptsError(
            "the count of prompts must be a number where a language model writes them, not null"
        )
    found = Collector(kind, anchor, targets)
    raw = RawAnswers(raw_path, source, kind=kind, anchor=anchor, targets=list(targets))
    for text, cut in raw.earlier:
        found.add(parse_answer(text, cut))
    if raw.earlier:
        log.info("%d prompts from answers in %s", len(found.prompts), raw_path)
    spent, problem = 0, None
    if len(found.prompts) < count:
        pause = backoff if source.get("endpoint") else 0.0  # only a server gets better by waiting
        spent, problem = _ask_on(maker(settings), settings, found, raw, count, pause)
    log.info("%s; left out: %s", _found(found, count, spent), found.refusals())
    if len(found.prompts) < count:
        last = f" (the last one: {problem})" if problem else ""
        raise PromptsError(
            f"{_found(found, count, spent)}{last}; left out: {found.refusals()}. Raise 'runtime.prompt_requests', or lower the "
            f"count of prompts, or write them to a file; the answers are in {raw_path}"
        )
    return found.prompts[:count]


def _ask_on(
    ask: Ask, settings: Mapping, found: Collector, raw: RawAnswers, count: int, backoff: float
) -> tuple[int, str | None]:
    """Ask until `found` holds `count` prompts or the budget is spent; returns what was spent and the last
    request's problem."""
    failures, attempts = 0, settings["attempts"]
    for spent in range(1, attempts + 1):
        prompt = instruction(
            found.kind.name,
            found.anchor,
            found.targets,
            settings["prompts_per_request"],
            found.prompts[-SHOWN:],
        )
        started = time.monotonic()
        answer = ask(prompt, (settings["seed"] or 0) + raw.number)
        raw.append(prompt, answer, time.monotonic() - started)
        if answer.final:
            raise PromptsError(f"{answer.problem} ({_found(found, count, spent)}; answers: {raw.path})")
        if answer.problem is None:
            failures, new = 0, found.add(parse_answer(answer.text, answer.cut))
            log.info("request %d: %d new prompts, %s", spent, new, _found(found, count, spent))
        else:
            failures += 1
            log.warning("request %d of %d: %s", spent, attempts, answer.problem)
            if spent < attempts:
                time.sleep(_delay(failures, answer.wait, backoff))
        if len(found.prompts) >= count:
            break
    return spent, answer.problem


def _the_source(source: Mapping) -> tuple[Callable[[Mapping], Ask], Mapping]:
    makers = {"language_model": local_model, "endpoint": endpoint}
    names = [name for name in makers if source.get(name)]
    if len(names) != 1:
        raise PromptsError(f"prompts by a model need one source (allowed: {', '.join(makers)})")
    return makers[names[0]], source[names[0]]


def _found(found: Collector, count: int, spent: int) -> str:
    return f"{min(len(found.prompts), count)} of {count} prompts after {spent} requests"


def _delay(failures: int, asked: float, backoff: float) -> float:
    """Seconds to wait: doubled with each failure, up to a minute, and jittered, but never less than `asked`."""
    return max(asked, min(60.0, backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0))


def instruction(kind: str, anchor: str, targets: Sequence[str], count: int, found: Sequence[str] = ()) -> str:
    """What the model is asked: for captions of the anchor or, where target prompts are searched for, for paraphrases."""
    memorized = KINDS[kind].searches_prompts
    words = " / ".join(targets) if memorized else " or ".join(f'"{target}"' for target in targets)
    text = INSTRUCTIONS["paraphrase" if memorized else "caption"]
    text = text.format(count=count, anchor=anchor, targets=words)
    return text + "\n\n" + INSTRUCTIONS["again"].format(found="\n".join(found)) if found else text


# Answers -> prompts

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
        value = [_or_none(match[1]) for match in whole if not match[2]]
    parts, strings = [value], []
    while parts:
        part = parts.pop(0)
        if isinstance(part, str):
            strings.append(part)
        elif isinstance(part, list | dict):
            parts[:0] = part if isinstance(part, list) else part.values()
    return strings


def _or_none(text: str) -> str | None:
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


class RawAnswers:
    """A file of JSON lines, one a request. `earlier`: its good answers to the same question; `number`: the next
    request's."""

    def __init__(self, path: str | Path, source: Mapping, **question: object) -> None:
        self.path, self.question = Path(path), question
        what = {
            name: {key: value for key, value in part.items() if key not in MANNERS}
            for name, part in source.items()
            if part
        }
        content = json.dumps([what, question], sort_keys=True)
        self.source = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.earlier: list[tuple[str, bool]] = []
        self.number = 0
        text = self.path.read_text("utf-8", "replace") if self.path.exists() else ""
        self._gap = "\n" if text and not text.endswith("\n") else ""  # a killed job may leave half a line
        for line in text.split("\n"):
            record = _or_none(line)
            if isinstance(record, dict) and record.get("source") == self.source:
                self.number += 1
                if record["status"] == "ok":
                    self.earlier.append((record["answer"], record["cut"]))

    def append(self, prompt: str, answer: Answer, seconds: float) -> None:
        """Write one request down, at once."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": self.source,
            "request": self.number,
            **self.question,
            "prompt": prompt,
            "status": answer.status,
            "seconds": round(seconds, 3),
            "cut": answer.cut,
            "problem": answer.problem,
            "answer": answer.text,
        }
        self.number += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._gap + json.dumps(record, ensure_ascii=False) + "\n")
        self._gap = ""
