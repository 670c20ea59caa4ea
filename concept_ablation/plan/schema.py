"""Check configs against JSON schemas. All problems are reported together, with key, value and what is allowed."""

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
from concept_ablation.registries import KINDS, METHODS, WAYS

MAX_PARTS, MAX_DEPTH = 100_000, 50  # the most values and the deepest nesting of a config


MAX_NUMBER = 1e18
NAMES = {"kinds": KINDS, "ways": WAYS}  # the registries that a schema may name


class ConfigError(UserError):
    """The configuration can't be used; `str()` lists every problem, one a line."""


@dataclass(frozen=True)
class Problem:
    """One mistake. `path`: the dotted key; `message`: what is there and what is allowed."""

    path: str
    message: str


def load_schema(path: str | Path) -> dict:
    """Read a JSON schema written in YAML.

    These forms in it are expanded:

    - `{layer_of: [a, b], with: [c]}`: a group with any keys of the schema's properties a and b, none of them required,
      and property c as it is.
    - `{part_of: a}`: the same keys as property a, none of them required.
    - `{registry: kinds}`: one of the registry's names.
    - `{registry: kinds, each: s}`: a group with a key of schema s for each of the registry's names.
    - `{registry: method_settings}`: the config's `method`.
    """
    schema = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    found = _with_layers(schema, schema.get("properties", {}))
    if "bundles" in found.get("properties", {}):
        _add_ways(found["properties"]["bundles"])
    return found


def _add_ways(bundles: dict) -> None:
    """Let `bundles`, and each bundle in it, have a group of settings for each way that has its own."""
    own = {
        name: {"type": "object", "additionalProperties": False, "properties": dict(way.schema)}
        for name, way in WAYS.items()
        if way.schema
    }
    bundles["properties"] |= own
    bundles["properties"]["named"]["additionalProperties"]["properties"] |= own


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
    if "part_of" in part:
        return _optional(_with_layers(sections[part["part_of"]], sections))
    if "layer_of" in part:
        inner = {name: _optional(_with_layers(sections[name], sections)) for name in part["layer_of"]}
        inner |= {name: _with_layers(sections[name], sections) for name in part.get("with", ())}
        return {"type": "object", "additionalProperties": False, "properties": inner}
    return {key: _with_layers(value, sections) for key, value in part.items()}


def _method_settings() -> dict:
    """The schema of the method's name and, for each method that has settings, a group of them."""
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
    """The content of a config file (YAML or JSON).

    Raises ConfigError, with the line, if it isn't valid, has a key twice, or holds more than a config can need.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        is_json = Path(path).suffix == ".json"  # may be indented with tabs, which YAML forbids
        content = json.loads(text) if is_json else yaml.load(text, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: holds {show(content)}, not a group of keys such as 'results: results'")
    check_sane(content or {}, str(path))
    return content or {}


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys; the plain one silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[tuple] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {show(key.value)} occurs twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def check_sane(content: object, source: str) -> None:
    """Refuse content that no config needs and that would break later code.

    Raises ConfigError for endless or huge groups, keys that aren't texts, numbers that aren't finite or exceed
    MAX_NUMBER, and texts with control characters or surrogates.
    """
    found, parts = 0, [("", content, 0)]
    while parts:
        path, value, depth = parts.pop()
        found += 1
        if found > MAX_PARTS or depth > MAX_DEPTH:
            raise ConfigError(
                f"{source}: holds more than {MAX_PARTS} values or more than {MAX_DEPTH} nested groups"
            )
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str) or not _is_sane(key):
                    raise ConfigError(f"{source}: {path or '(top)'}: the key {show(key)} is not a plain text")
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
    """Every way in which `instance` breaks `schema`, sorted by key."""
    found = [p for error in Draft202012Validator(schema).iter_errors(instance) for p in _explain(error)]
    return sorted(found, key=lambda problem: problem.path)


def check_config(config: Mapping, schema: Mapping, source: str) -> dict:
    """The `config` with texts converted where the schema wants another type: YAML reads `1e-4` as a text.

    Raises ConfigError, which lists every problem, if it doesn't follow `schema`. `source`: the files that it came from.
    """
    check_sane(config, source)
    typed = _typed(config, schema)
    found = find_problems(typed, schema)
    if found:
        lines = [f"{source}: {len(found)} error{'s' if len(found) > 1 else ''}"]
        raise ConfigError("\n".join(lines + [f"  {problem.path}: {problem.message}" for problem in found]))
    return typed


def to_type(text: str, kinds: str | Sequence[str]) -> object:
    """`text` as the first of the JSON types `kinds` that it can be read as; else unchanged, to be refused."""
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
    """`value` with its texts converted to the types that the schema wants."""
    if isinstance(value, Mapping):
        parts, others = schema.get("properties", {}), schema.get("additionalProperties")
        others = others if isinstance(others, Mapping) else {}
        return {key: _typed(part, parts.get(key, others)) for key, part in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [_typed(part, schema["items"]) for part in value]
    kinds = schema.get("type", "string")
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return int(value)  # the schema takes 1.0 and 1e3 as whole numbers, so they become integers
    return to_type(value, kinds) if isinstance(value, str) and "string" not in kinds else value


def _explain(error: ValidationError) -> Iterator[Problem]:
    """A jsonschema error in plain words. Each unknown or missing key is a problem of its own."""
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
    """The message about a `value` that breaks one schema keyword: `'x' is not one of a, b (did you mean 'a'?)`."""
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
