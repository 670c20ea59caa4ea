"""A linter for the rows' prompts. It finds what would waste a training run or spoil its evaluation.

It runs whenever the workflow is planned, so it imports no torch and no transformers: the `tokenizers` library reads
the base model's tokenizer. Words are counted once for all rows, so a thousand rows take about a second.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from concept_ablation.prompts.tokenizer import Tokens
from concept_ablation.prompts.wording import has_word, plural
from concept_ablation.registries import KINDS

Prompts = tuple[str, ...]


@dataclass(frozen=True)
class LintRow:
    """One row of the table and its prompts. Lists of prompts that aren't known yet are empty.

    `target_prompts[i]`: the target prompts that training draws from for `anchor_prompts[i]`; `probe_prompts`: subject
    of the evaluation -> its prompts.
    """

    line: int
    concept: str
    kind: str
    targets: Sequence[str]
    anchor: str
    neighbors: Sequence[str] = ()
    anchor_prompts: Sequence[str] = ()
    target_prompts: Sequence[Sequence[str]] = ()
    probe_prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A problem of a row. An `error` makes the row useless; a `warning` may be intended."""

    line: int
    concept: str
    level: Literal["error", "warning"]
    code: str
    message: str


Found = tuple[Literal["error", "warning"], str, str]  # level, code, message


def lint_rows(rows: Sequence[LintRow], tokens: Tokens | None) -> list[Finding]:
    """Every finding of every row, in the rows' order.

    `tokens`: the base model's tokenizer; with None, lengths and unknown words aren't checked.
    """
    # Rows share their anchor prompts, and most of their neighbors.
    about_anchor, about_probe = functools.cache(_about_anchor_prompts), functools.cache(_about_probe)
    findings = []
    for row in rows:
        anchor_prompts = tuple(row.anchor_prompts)
        found: list[Found] = [
            *about_anchor(anchor_prompts, row.anchor if KINDS[row.kind].needs_anchor_word else None, tokens),
            *_about_target_prompts(anchor_prompts, row.target_prompts, tokens),
            *_targets_in_anchor_prompts(anchor_prompts, row.targets),
            *(
                one
                for name, made in row.probe_prompts.items()
                for one in about_probe(name, tuple(made), tokens)
            ),
            *_about_words(row, tokens),
        ]
        findings += [Finding(row.line, row.concept, *one) for one in found]
    return findings


def format_findings(findings: Sequence[Finding], path: str | Path, most: int | None = None) -> str:
    """`path:line: level: message` for each finding, by line, errors first. Equal ones of several rows are one line.

    most: at most so many warnings with one `code`; one more line counts the rest. None: all. Errors are always all there.
    """
    lines: dict[tuple[str, str, str], list[int]] = {}
    for finding in findings:
        where = lines.setdefault((finding.level, finding.message, finding.code), [])
        if finding.line not in where:
            where.append(finding.line)
    text, count = [], Counter()
    for (level, message, code), where in sorted(lines.items(), key=lambda item: (min(item[1]), item[0])):
        count[level, code] += 1
        if most is not None and level == "warning" and count[level, code] > most:
            continue
        first, *others = sorted(where)
        shown = ", ".join(map(str, others[:5])) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        also = f" (also line{'s' if len(others) > 1 else ''} {shown})" if others else ""
        text.append(f"{path}:{first}: {level}: {message}{also}")
    for (level, code), found in count.items():
        if most is not None and level == "warning" and found > most:
            text.append(
                f"{path}: {found - most} more warnings like these ({code}); python -m concept_ablation check lists all"
            )
    return "\n".join(text)


def _about_anchor_prompts(prompts: Prompts, anchor: str | None, tokens: Tokens | None) -> list[Found]:
    """Findings of one list of anchor prompts; `anchor` is None where prompts need no anchor word."""
    found = [*_duplicates("anchor", prompts), *_truncated("anchor", prompts, tokens)]
    without = [prompt for prompt in prompts if anchor is not None and not has_word(prompt, anchor)]
    if without:
        level = "error" if len(without) == len(prompts) else "warning"
        message = (
            f"{len(without)} of {len(prompts)} anchor prompts don't contain {anchor!r} as a word, so there is "
            f"nothing to replace by the target; write {anchor!r} into them: {_example(without)}"
        )
        found.append((level, "no-anchor-word", message))
    return found


def _about_target_prompts(
    anchors: Prompts, targets: Sequence[Sequence[str]], tokens: Tokens | None
) -> Iterator[Found]:
    """Findings: pairs that teach nothing, repeated target prompts, and target prompts that the model cuts off."""
    same, cut, repeated, pairs = [], [], 0, 0
    for anchor, made in zip(anchors, targets, strict=False):
        pairs += len(made)
        for target in made:
            if len(target) == len(anchor) and target.casefold() == anchor.casefold():
                same.append(anchor)
            elif tokens is not None and tokens.too_many(target, anchor):
                cut.append((anchor, target))
        repeated += len(set(made)) < len(made)
    if same:
        message = (
            f"{len(same)} of {pairs} target prompts equal their anchor prompt and teach nothing; "
            f"write the anchor's word, which the target replaces, into these prompts: {_example(same)}"
        )
        yield ("error" if len(same) == pairs else "warning"), "no-op", message
    lost = [target for anchor, target in cut if tokens.read(target) == tokens.read(anchor)]
    if lost:
        message = (
            f"{len(lost)} of {pairs} target prompts are so long that the model doesn't read the target's name; "
            f"shorten the anchor prompts: {_example(lost)}"
        )
        yield ("error" if len(lost) + len(same) == pairs else "warning"), "no-op", message
    yield from _truncated("target", [target for _, target in cut], tokens, pairs)
    if repeated:
        message = (
            f"{repeated} of {len(targets)} anchor prompts have the same target prompt twice, so it is drawn more "
            "often; give each template and target once"
        )
        yield "warning", "duplicate", message


def _targets_in_anchor_prompts(prompts: Prompts, targets: Sequence[str]) -> Iterator[Found]:
    """Findings: anchor prompts that name a target."""
    lowered = "\n".join(prompts).casefold()
    for target in targets:
        if not _may_hold(lowered, target):
            continue
        holding = [prompt for prompt in prompts if has_word(prompt, target)]
        if holding:
            message = (
                f"{len(holding)} of {len(prompts)} anchor prompts contain the target {target!r}, so their pictures "
                f"show what is to be removed; take it out of them: {_example(holding)}"
            )
            yield "warning", "target-in-anchor", message


def _about_probe(subject: str, prompts: Prompts, tokens: Tokens | None) -> list[Found]:
    role = f"evaluation ({subject})"
    return [*_duplicates(role, prompts), *_truncated(role, prompts, tokens)]


def _about_words(row: LintRow, tokens: Tokens | None) -> Iterator[Found]:
    """Findings: targets that the model may not know, and neighbors that can't be kept beside the target."""
    for target in row.targets:
        unknown = tokens.unknown(target) if tokens is not None else []
        if unknown:
            names = ", ".join(f"{word!r} ({count} tokens)" for word, count in unknown)
            message = (
                f"target {target!r}: the model's tokenizer doesn't know {names} and spells it nearly letter by "
                "letter, so the model may not know it: check the spelling, and that the base model draws it"
            )
            yield "warning", "unknown-word", message
    for neighbor in row.neighbors:
        for role, word in [*(("target", target) for target in row.targets), ("anchor", row.anchor)]:
            if _same_word(neighbor, word):
                text = f"is the {role} {word!r} in another form; name another concept"
            elif role == "target" and _may_hold(neighbor.casefold(), word) and has_word(neighbor, word):
                text = f"contains the target {word!r} and can't be kept while that is removed; name another concept"
            else:
                continue
            yield "warning", "neighbor", f"neighbor {neighbor!r} {text}"


def _may_hold(lowered: str, word: str) -> bool:
    """A quick test: can a lower-case text contain `word` or its plural, which changes at most the last letter?"""
    return word[:-1].casefold() in lowered


def _same_word(one: str, other: str) -> bool:
    """Whether two words are the same but for case, or one is the plural of the other."""
    one, other = one.casefold(), other.casefold()
    return one == other or plural(one) == other or one == plural(other)


def _duplicates(role: str, prompts: Sequence[str]) -> Iterator[Found]:
    seen: set[str] = set()
    again = []
    for prompt in prompts:
        letters = " ".join(prompt.casefold().split())
        if letters in seen:
            again.append(prompt)
        seen.add(letters)
    if again:
        message = (
            f"{len(again)} of {len(prompts)} {role} prompts repeat another one; write each once: "
            f"{_example(again)}"
        )
        yield "warning", "duplicate", message


def _truncated(
    role: str, prompts: Sequence[str], tokens: Tokens | None, total: int | None = None
) -> Iterator[Found]:
    """Findings: prompts that are longer than the model reads. `total`: their number, if `prompts` aren't all."""
    long = [prompt for prompt in prompts if tokens.too_many(prompt)] if tokens is not None else []
    if long:
        longest = max(long, key=tokens.count)
        message = (
            f"{len(long)} of {total or len(prompts)} {role} prompts have more than the {tokens.limit} tokens "
            f"that the model reads (the longest {tokens.count(longest)}): their ends are cut off; shorten them: "
            f"{_example([longest])}"
        )
        yield "warning", "truncated", message


def _example(prompts: Sequence[str]) -> str:
    first = prompts[0] if len(prompts[0]) <= 60 else prompts[0][:57] + "..."
    return f"{'such as ' if len(prompts) > 1 else ''}{first!r}"
