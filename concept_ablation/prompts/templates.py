"""Prompt files and templates.

A prompt file holds one template a line; a line that starts with `#` is a comment. `{subject}` stands for the concept,
any other `{slot}` for each of the slot's values in turn. `a` or `an` before a slot is corrected. A line without slots
is a prompt.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.common.errors import UserError
from concept_ablation.prompts.wording import ARTICLE, with_article

SLOT = re.compile(r"\{(\w+)\}")


SLOT_AND_ARTICLE = re.compile(ARTICLE + r"\{(?P<slot>\w+)\}")


class PromptsError(UserError):
    """Prompts can't be made; the message names the file or the anchor and says what to do."""


def read_templates(path: str | Path) -> list[str]:
    """The templates of a prompt file, in order, without comments and repeated lines. Raises PromptsError."""
    return list(_read(path)[0])


def file_source(path: str | Path) -> dict[str, str]:
    """A prompt file's part of a spec: its path and the SHA-256 of its content."""
    return {"file": str(path), "sha256": _read(path)[1]}


def _read(path: str | Path) -> tuple[tuple[str, ...], str]:
    """A prompt file's templates and the SHA-256 of its content. The file is read again only after it changed."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # reading a device or a pipe would never end
            raise PromptsError(f"{path}: can't be read: it is not a regular file")
        return _read_version(str(path), (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino))
    except OSError as error:
        raise PromptsError(f"{path}: can't be read: {error.strerror}") from None


@functools.lru_cache(maxsize=4096)
def _read_version(path: str, _version: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    content = Path(path).read_bytes()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise PromptsError(f"{path}: holds no prompt; write one per line")
    return found, hashlib.sha256(content).hexdigest()


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{slot}` replaced by its value and the article before it corrected.

    Raises PromptsError for a slot that has no value.
    """

    def put(match: re.Match) -> str:
        if match["slot"] not in values:
            known = ", ".join(f"{{{name}}}" for name in sorted(values))
            raise PromptsError(f"{template!r}: unknown slot {{{match['slot']}}} (allowed: {known})")
        value = values[match["slot"]]
        return (with_article(match["article"], value) if match["article"] else "") + value

    return SLOT_AND_ARTICLE.sub(put, template)


def expand(templates: Sequence[str], subject: str, slots: Mapping[str, Sequence[str]]) -> list[str]:
    """All prompts from the templates, with `subject` and every combination of slot values, without repetitions."""
    return list(_expand(tuple(templates), subject, tuple((name, tuple(slots[name])) for name in slots)))


@functools.lru_cache(maxsize=4096)
def _expand(
    templates: tuple[str, ...], subject: str, slot_values: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[str, ...]:
    prompts, slots = [], dict(slot_values)
    for template in templates:
        used = [name for name in dict.fromkeys(SLOT.findall(template)) if name in slots]
        for choice in itertools.product(*(slots[name] for name in used)):
            prompts.append(fill(template, {"subject": subject, **dict(zip(used, choice, strict=True))}))
    return tuple(dict.fromkeys(prompts))


def general_prompts(path: str | None, slots: Mapping[str, Sequence[str]]) -> list[str]:
    """The prompts of a file that names no subject, with the values of the slots that it uses; none without a file.

    Raises PromptsError.
    """
    if path is None:
        return []
    templates = read_templates(path)
    used = set(SLOT.findall("\n".join(templates)))
    return expand(templates, "", {name: values for name, values in slots.items() if name in used})


def subsample_evenly(prompts: Sequence[str], count: int | None) -> list[str]:
    """At most `count` of the prompts (None: all), evenly spaced."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]
