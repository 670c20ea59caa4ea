"""Prompts: from a file's templates to anchor, target and probe prompts.

A prompt file holds one template a line; `#` starts a comment line. `{subject}` stands for the concept, any
other `{slot}` for each of the slot's values in turn. `a` or `an` before a slot is set right. A line without
slots is a prompt as it stands.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.runtime import atomic_output, damaged

log = logging.getLogger(__name__)
# The target prompts of the two published codes, each as likely as the others (a form twice as likely stands twice).
TEMPLATE_SETS = {
    "compvis": {
        "style": (
            "{prompt}, in the style of {target} {target}",
            "{prompt}, in the style of {target}",
            "{target} {target} inspired painting, {prompt}",
            "{target} inspired painting, {prompt}",
            "in {target} {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
    },
    "diffusers": {
        "style": (
            "{prompt}, in the style of {target}",
            "in {target}'s style, {prompt}",
            "in {target}'s style, {prompt}",
        ),
        "unsafe": ("{target}, {prompt}", "in {target} style, {prompt}", "{prompt}, {target}"),
    },
}
UNSAFE = ("nudity", "inappropriate")  # kinds whose targets are terms added to a prompt
PARAPHRASES = "paraphrases of {}"  # the subject of the probe that asks for a target in other words
SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = r"(?P<article>\b[Aa]n?\s+)?"
SLOT_AND_ARTICLE = re.compile(ARTICLE + r"\{(?P<slot>\w+)\}")


class PromptsError(ValueError):
    """Prompts can't be made; the message names the file or the anchor and says what to do."""


def read_templates(path: str | Path) -> list[str]:
    """The templates of a prompt file, in order, without comments and repeated lines. Raises PromptsError."""
    return list(_read(path)[0])


def read_prompts(path: str | Path) -> dict:
    """What `write_prompts` or a search wrote: `prompts`, and of a search `target_prompts`. Raises PromptsError."""
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        if written["prompts"] and all(isinstance(prompt, str) for prompt in written["prompts"]):
            return written
        problem = "it holds no prompts"
    except FileNotFoundError:
        raise PromptsError(f"{path}: there are no such prompts") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise damaged(PromptsError, path, f"damaged prompts ({problem})")


def file_source(path: str | Path) -> dict[str, str]:
    """A prompt file as a spec names it: its path and the sha256 of its content."""
    return {"file": str(path), "sha256": _read(path)[1]}


def _read(path: str | Path) -> tuple[tuple[str, ...], str]:
    """A prompt file's templates and the sha256 of its content; read once as long as it doesn't change."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # of a device or a pipe the reading never ends
            raise PromptsError(f"{path}: can't be read: it is no file")
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
        raise PromptsError(f"{path}: holds no prompt; write one a line")
    return found, hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=65536)
def with_article(article: str, word: str) -> str:
    """`article` (a, an, A or An) as English wants it before `word`: `an owl`, `a unicorn`, `an r2d2`."""
    first = word.split()[0].lower() if word.split() else ""
    vowel = re.match(r"[aeiou]|hour|honest|heir|[fhlmnrsx]\d|[fhlmnrsx]$", first)
    glide = re.match(r"uni|use|usu|ut[ei]|eu|one\b|once|ufo|ukulele", first)
    return article[0] + ("n " if vowel and not glide else " ")


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{slot}` replaced by its value, the article before it set right.

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
    """Every prompt that the templates make of `subject` and all combinations of slot values, none twice."""
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


@functools.lru_cache(maxsize=65536)
def plural(noun: str) -> str:
    """The regular English plural of a noun phrase: `grumpy cat` -> `grumpy cats`."""
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def replace_word(prompt: str, word: str, other: str) -> str:
    """`prompt` with `word` replaced by `other`: whole words, any case, the article before it set right.

    A capital first letter and all capitals carry over, a plural becomes a plural. `fisherman` holds no
    `fish`.
    """
    forms = {plural(word).lower(): plural(other), word.lower(): other}

    def put(match: re.Match) -> str:
        found, new = match["word"], forms[match["word"].lower()]
        if found.isupper() and len(found) > 1:
            new = new.upper()
        elif found[0].isupper():
            new = new[0].upper() + new[1:]
        return (with_article(match["article"], new) if match["article"] else "") + new

    return _word_pattern(word).sub(put, prompt)


def has_word(prompt: str, word: str) -> bool:
    """Whether `prompt` holds `word` or its plural as a whole word, in any case."""
    return _either_form(word).search(prompt) is not None


@functools.lru_cache(maxsize=4096)
def _either_form(word: str) -> re.Pattern:
    """`word` or its plural as a whole word in any case."""
    words = f"{re.escape(word)}|{re.escape(plural(word))}"
    return re.compile(rf"(?<![\w-])({words})(?![\w-])", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def _word_pattern(word: str) -> re.Pattern:
    """The same, with the article before it, if there is one."""
    forms = sorted({word.lower(), plural(word).lower()}, key=len, reverse=True)
    words = "|".join(re.escape(form) for form in forms)
    return re.compile(rf"{ARTICLE}(?<![\w-])(?P<word>{words})(?![\w-])", re.IGNORECASE)


def anchor_prompts(
    kind: str,
    anchor: str,
    templates: Sequence[str],
    slots: Mapping[str, Sequence[str]],
    count: int | None = None,
) -> list[str]:
    """The anchor's prompts, at most `count` of them (None: all), spread evenly over what the templates make.

    For kind `object`, a prompt without the anchor word would train the target's own prompt on itself: such
    prompts are left out with one warning that counts them. Raises PromptsError if none holds the word.
    """
    prompts = expand(templates, anchor, slots)
    if kind == "object":
        prompts = holding(prompts, anchor)
    return spread(prompts, count)


def holding(prompts: Sequence[str], anchor: str) -> list[str]:
    """The prompts that hold the anchor as a word; a warning counts the others. Raises PromptsError if none does."""
    kept = [prompt for prompt in prompts if has_word(prompt, anchor)]
    if not kept:
        raise PromptsError(f"none of {len(prompts)} prompts holds the anchor {anchor!r} as a word")
    if len(kept) < len(prompts):
        left = len(prompts) - len(kept)
        log.warning("%d of %d prompts hold no %r and are left out", left, len(prompts), anchor)
    return kept


def spread(prompts: Sequence[str], count: int | None) -> list[str]:
    """At most `count` of the prompts (None: all), evenly spaced."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def template_set(kind: str, templates: str | Sequence[str]) -> list[str]:
    """The target templates of a kind: a list as it is, or a published set by its name.

    Raises PromptsError for an unknown name, and for a template without {prompt} or {target}.
    """
    if isinstance(templates, str):
        sets = TEMPLATE_SETS.get(templates)
        if sets is None:
            raise PromptsError(
                f"templates {templates!r} are unknown (allowed: {', '.join(TEMPLATE_SETS)}, or a list of templates)"
            )
        # The CompVis code has no templates for unsafe content: there is one published set of those.
        group = "unsafe" if kind in UNSAFE else kind
        templates = sets.get(group) or TEMPLATE_SETS["diffusers"].get(group, ())
    for template in templates:
        if set(SLOT.findall(template)) != {"prompt", "target"}:
            raise PromptsError(f"template {template!r} needs {{prompt}} and {{target}}, and no other slot")
    return list(templates)


def target_prompts(
    prompts: Sequence[str], kind: str, targets: Sequence[str], anchor: str, templates: Sequence[str]
) -> list[tuple[str, ...]]:
    """For each anchor prompt, the target prompts that training draws from, each as likely as the others.

    Kind `object`: the anchor word replaced by each target. `style`, `nudity`, `inappropriate`: each of `templates`
    filled with `{prompt}` and each `{target}`. Raises PromptsError for another kind.
    """
    if kind == "object":
        return [tuple(replace_word(prompt, anchor, target) for target in targets) for prompt in prompts]
    if kind == "style" or kind in UNSAFE:
        return [
            tuple(
                fill(template, {"prompt": prompt, "target": target})
                for target in targets
                for template in templates
            )
            for prompt in prompts
        ]
    allowed = ", ".join(("object", "style", *UNSAFE))
    raise PromptsError(f"kind {kind!r} has no target prompts of this form (allowed: {allowed})")


def probe_prompts(
    kind: str,
    role: str,
    subject: str,
    anchor: str,
    templates: Sequence[str],
    slots: Mapping[str, Sequence[str]],
    probe_template: str,
) -> list[str]:
    """The evaluation prompts of `subject`, which is a row's `role`: target, paraphrase, anchor or neighbor.

    A style (target or neighbor), and unsafe terms, are added to the anchor's prompts by `probe_template`; an object
    takes the anchor's place in them; all else fills the templates' `{subject}`.
    """
    added = role != "anchor" and (kind == "style" or (kind in UNSAFE and role in ("target", "paraphrase")))
    if added:
        prompts = expand(templates, anchor, slots)
        return [fill(probe_template, {"prompt": prompt, "target": subject}) for prompt in prompts]
    if kind == "object":
        prompts = anchor_prompts(kind, anchor, templates, slots)
        return prompts if role == "anchor" else [replace_word(prompt, anchor, subject) for prompt in prompts]
    return expand(templates, subject, slots)


def write_prompts(spec: Mapping, path: str | Path, asking: Mapping | None = None) -> list[str]:
    """Stage `write_prompts`: make the spec's anchor prompts and write them as JSON to `path`.

    Their source is a file, or a language model, whose raw answers are kept beside `path` as `.answers.jsonl`. `asking`:
    how a model is asked, which is no part of the spec: `attempts`, `timeout` (s), `key_variable`, `device`. Raises
    PromptsError.
    """
    source = spec["source"]
    if "file" in source:
        templates = read_templates(source["file"])
        if file_source(source["file"])["sha256"] != source["sha256"]:
            raise PromptsError(f"{source['file']}: was changed after this run was planned; start it again")
        prompts = anchor_prompts(spec["kind"], spec["anchor"], templates, spec["slots"], spec["count"])
    else:
        from concept_ablation.prompt_writers import write_by_model

        answers = Path(path).with_suffix(".answers.jsonl")
        words = {name: spec[name] for name in ("anchor", "kind", "targets", "count")}
        source = {name: {**settings, **(asking or {})} for name, settings in source.items()}
        prompts = write_by_model(source, raw_path=answers, **words)
    content = {"kind": spec["kind"], "anchor": spec["anchor"], "prompts": prompts}
    with atomic_output(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("wrote %d prompts of %r to %s", len(prompts), spec["anchor"], path)
    return prompts
