"""Schema checks that tell everything at once: each problem with its place, its value and what is allowed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from concept_ablation.common.errors import UserError, did_you_mean, show
from concept_ablation.registries import KINDS, METHODS

MAX_PARTS, MAX_DEPTH = 100_000, 50  # of a config: its values, and groups in groups


MAX_NUMBER = 1e18
NAMES = {"kinds": KINDS}  # what a schema may ask a registry for


class ConfigError(UserError):
    """The configuration can't be used; `str()` lists every problem, one a line."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `path` is the dotted key, `message` says what is there and what is allowed."""

    path: str
    message: str


def load_schema(path: str | Path) -> dict:
    """Read a JSON schema written in YAML.

    `{layer_of: [a, b], with: [c]}` in it stands for a group that may hold any keys of the schema's properties a and b,
    none required, and property c as it is; `{registry: kinds}` for one of a registry's names; `{registry: kinds, each: s}`
    for a group with a key of schema s for each of its names; `{registry: method_settings}` for the config's `method`.
    """
    schema = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return _with_layers(schema, schema.get("properties", {}))


def _with_layers(part: object, sections: Mapping) -> object:
    if isinstance(part, list):
        return [_with_layers(item, sections) for item in part]
    if not isinstance(part, Mapping):
        return part
    if part.get("registry") == "method_settings":
        return _method_settings()
    if "registry" in part:
        names = list(NAMES[part["registry"]])
        if "each" not in part:
            return {**{key: part[key] for key in part if key != "registry"}, "enum": names}
        each = _with_layers(part["each"], sections)
        return {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(names, each)}
    if "layer_of" in part:
        inner = {name: _optional(_with_layers(sections[name], sections)) for name in part["layer_of"]}
        inner |= {name: _with_layers(sections[name], sections) for name in part.get("with", ())}
        return {"type": "object", "additionalProperties": False, "properties": inner}
    return {key: _with_layers(value, sections) for key, value in part.items()}


def _method_settings() -> dict:
    """A group with the method's name and, for each method that has settings, a group of those."""
    own = {
        name: {"type": "object", "additionalProperties": False, "properties": dict(METHODS[name].schema)}
        for name in METHODS
        if METHODS[name].schema
    }
    names = {"enum": list(METHODS), "description": "one of the methods"}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {"name": names, **own},
    }


def _optional(schema: object) -> object:
    """A schema in which no key is required."""
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: {name: _optional(inner) for name, inner in value.items()} if key == "properties" else value
        for key, value in schema.items()
        if key != "required"
    }


def read_config(path: str | Path) -> dict:
    """What a config file (YAML or JSON) holds. Raises ConfigError, which names the line: no YAML, a key that stands twice,
    or more than a config can need."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        is_json = Path(path).suffix == ".json"  # may be indented by tabs, which YAML forbids
        content = json.loads(text) if is_json else yaml.load(text, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"{where}: no valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: no valid YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: holds {show(content)}, not a group of keys such as 'results: results'")
    check_sane(content or {}, str(path))
    return content or {}


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is a mistake; in plain YAML the second one wins without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[tuple] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {show(key.value)} stands twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def check_sane(content: object, source: str) -> None:
    """Raises ConfigError for what no config holds and much code stumbles over: endless or huge groups, keys that are no
    text, numbers that are none, texts that can't be written."""
    found, parts = 0, [("", content, 0)]
    while parts:
        path, value, depth = parts.pop()
        found += 1
        if found > MAX_PARTS or depth > MAX_DEPTH:
            raise ConfigError(
                f"{source}: holds more than {MAX_PARTS} values or {MAX_DEPTH} groups in each other"
            )
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str) or not _is_sane(key):
                    raise ConfigError(f"{source}: {path or '(top)'}: the key {show(key)} is no plain text")
                parts.append((f"{path}.{key}" if path else key, inner, depth + 1))
        elif isinstance(value, list | tuple):
            parts += [(f"{path}.{number}", inner, depth + 1) for number, inner in enumerate(value)]
        elif not _is_sane(value):
            raise ConfigError(f"{source}: {path or '(top)'}: {show(value)} is not allowed in a config")


def _is_sane(value: object) -> bool:
    if isinstance(value, str):
        return all(c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cs") for c in value)
    if isinstance(value, bool) or value is None:
        return True
    return isinstance(value, int | float) and abs(value) <= MAX_NUMBER


def find_problems(instance: object, schema: Mapping) -> list[Problem]:
    """Every way in which `instance` breaks `schema`, in the order of their keys."""
    found = [p for error in Draft202012Validator(schema).iter_errors(instance) for p in _explain(error)]
    return sorted(found, key=lambda problem: problem.path)


def check_config(config: Mapping, schema: Mapping, source: str) -> dict:
    """`config`, texts such as `1e-4`, which YAML and `--config` read as texts, made numbers where those
    belong.

    Raises ConfigError, listing every problem, unless it follows `schema`. `source` names the files it came
    from.
    """
    check_sane(config, source)
    typed = _typed(config, schema)
    found = find_problems(typed, schema)
    if found:
        lines = [f"{source}: {len(found)} error{'s' if len(found) > 1 else ''}"]
        raise ConfigError("\n".join(lines + [f"  {problem.path}: {problem.message}" for problem in found]))
    return typed


def to_type(text: str, kinds: str | Sequence[str]) -> object:
    """`text` as the first of the JSON types `kinds` that it can be read as; else as it is, to be refused."""
    words = {"boolean": {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}}
    words["null"] = {"": None, "null": None, "none": None}
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in words and text.lower() in words[kind]:
            return words[kind][text.lower()]
        if kind in ("integer", "number"):
            try:
                number = int(text) if kind == "integer" else float(text)
            except ValueError:
                continue
            if abs(number) < float("inf"):
                return number
    return text


def _typed(value: object, schema: Mapping) -> object:
    """`value` with each text, where its schema wants another type, read as that type."""
    if isinstance(value, Mapping):
        parts, others = schema.get("properties", {}), schema.get("additionalProperties")
        others = others if isinstance(others, Mapping) else {}
        return {key: _typed(part, parts.get(key, others)) for key, part in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [_typed(part, schema["items"]) for part in value]
    kinds = schema.get("type", "string")
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return int(value)  # 1.0 and 1e3 are whole numbers to the schema, so they become ones
    return to_type(value, kinds) if isinstance(value, str) and "string" not in kinds else value


def _explain(error: ValidationError) -> Iterator[Problem]:
    """Say one jsonschema error in plain words; unknown and missing keys give one problem each."""
    path = [str(part) for part in error.absolute_path]
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        for key in sorted(set(error.instance) - set(known), key=str):
            hint = did_you_mean(key, known) or f" (allowed: {', '.join(known)})"
            yield Problem(".".join([*path, str(key)]), f"unknown key{hint}")
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                yield Problem(".".join([*path, key]), "is missing")
    else:
        shown = "(not shown)" if error.schema.get("secret") else error.instance
        yield Problem(".".join(path) or "(top)", complaint(shown, error.validator, error.validator_value))


def complaint(value: object, rule: str, allowed: object) -> str:
    """What is wrong with `value` under one schema keyword: `'x' is not one of a, b (did you mean 'a'?)`."""
    shown = show(value)
    if rule == "enum":
        words = [str(word) for word in allowed]
        return f"{shown} is not one of {', '.join(words)}{did_you_mean(str(value), words)}"
    if rule == "type":
        names = {
            "null": "empty",
            "number": "a number",
            "integer": "a whole number",
            "boolean": "true or false",
        }
        names |= {"string": "a text", "array": "a list", "object": "a group of keys"}
        kinds = [allowed] if isinstance(allowed, str) else list(allowed)
        return f"{shown} is not {' or '.join(names[kind] for kind in kinds)}"
    limits = {
        "minimum": "must be at least {}",
        "exclusiveMinimum": "must be more than {}",
        "maximum": "must be at most {}",
        "exclusiveMaximum": "must be less than {}",
        "minLength": "must have at least {} character(s)",
        "maxLength": "must have at most {} characters",
        "minItems": "must have at least {} item(s)",
        "maxItems": "must have at most {} item(s)",
        "multipleOf": "must be a multiple of {}",
        "pattern": "has the wrong form",
    }
    return f"{shown} {limits.get(rule, rule + ' {}').format(allowed)}"
