"""Anchor prompts written by a language model: one on this machine, or one behind an OpenAI-compatible endpoint.

The model is asked for image captions, a few at a time, until there are enough or the budget of requests is spent. Its
answers are never trusted: `parse_answer` extracts the captions, and `Collector` keeps those that can be anchor
prompts and counts the others by reason. Every answer is appended to a file of raw answers at once. A later call with
the same question starts from the answers in that file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from concept_ablation.prompts.answers import Collector, json_or_none, parse_answer
from concept_ablation.prompts.clients import Answer, Ask, endpoint
from concept_ablation.prompts.local_model import local_model
from concept_ablation.prompts.templates import PromptsError
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
SHOWN = 8  # how many earlier captions the model is shown
# Settings that say how to ask, not what for: earlier answers are used again after these were changed.
TRANSPORT_SETTINGS = ("attempts", "timeout", "device", "key_variable")


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

    `source` has one key: `language_model` (see `local_model`) or `endpoint` (see `endpoint`). Every request counts
    towards its `attempts`, also a failed one. After a failure the wait is `backoff` seconds, doubled each time. Raw
    answers are appended to `raw_path` as JSON lines; earlier ones there, of the same source, kind, anchor and
    targets, are used first. Raises PromptsError when the budget is spent, or at once if asking again can't help; the
    message says how many prompts were found.
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
        pause = backoff if source.get("endpoint") else 0.0  # waiting only helps with a server
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
    """Ask until `found` holds `count` prompts or the budget is spent.

    Returns the number of requests and the last one's problem, or None.
    """
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
    """Seconds to wait: doubled with each failure up to a minute, with jitter, but at least `asked`."""
    return max(asked, min(60.0, backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0))


def instruction(kind: str, anchor: str, targets: Sequence[str], count: int, found: Sequence[str] = ()) -> str:
    """The instruction to the model: to write captions of the anchor or, for a memorized picture, paraphrases."""
    memorized = KINDS[kind].searches_prompts
    words = " / ".join(targets) if memorized else " or ".join(f'"{target}"' for target in targets)
    text = INSTRUCTIONS["paraphrase" if memorized else "caption"]
    text = text.format(count=count, anchor=anchor, targets=words)
    return text + "\n\n" + INSTRUCTIONS["again"].format(found="\n".join(found)) if found else text


class RawAnswers:
    """A file of JSON lines, one a request.

    `earlier`: its usable answers to the same question, each with whether it was cut; `number`: that of the next
    request.
    """

    def __init__(self, path: str | Path, source: Mapping, **question: object) -> None:
        self.path, self.question = Path(path), question
        what = {
            name: {key: value for key, value in part.items() if key not in TRANSPORT_SETTINGS}
            for name, part in source.items()
            if part
        }
        content = json.dumps([what, question], sort_keys=True)
        self.source = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.earlier: list[tuple[str, bool]] = []
        self.number = 0
        text = self.path.read_text("utf-8", "replace") if self.path.exists() else ""
        self._gap = "\n" if text and not text.endswith("\n") else ""  # a killed job can leave half a line
        for line in text.split("\n"):
            record = json_or_none(line)
            if isinstance(record, dict) and record.get("source") == self.source:
                self.number += 1
                if record["status"] == "ok":
                    self.earlier.append((record["answer"], record["cut"]))

    def append(self, prompt: str, answer: Answer, seconds: float) -> None:
        """Append one request to the file."""
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
