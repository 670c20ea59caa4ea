"""Settings as groups of keys: laid over each other, and told apart from their defaults."""

from __future__ import annotations

import copy
from collections.abc import Mapping


def merge(base: dict, layer: Mapping) -> None:
    """Put the keys of `layer` into `base`, groups key by key; lists are replaced whole."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def changed(settings: Mapping, defaults: Mapping) -> dict:
    """The settings that differ from their defaults: what names a result, so that a new setting renames none."""
    return {
        name: value for name, value in settings.items() if name not in defaults or value != defaults[name]
    }


def without(spec: Mapping, neutral: Mapping[str, object]) -> dict:
    """`spec` without the entries, by dotted path, that have the values of `neutral`; groups on the way are copied."""
    own = dict(spec)
    for path, value in neutral.items():
        *groups, last = path.split(".")
        part = own
        for group in groups:
            if not isinstance(part.get(group), Mapping):
                break
            part[group] = dict(part[group])
            part = part[group]
        else:
            if last in part and part[last] == value:
                del part[last]
    return own
