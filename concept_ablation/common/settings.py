"""Nested settings: merge layers of them, and leave out what equals a default."""

from __future__ import annotations

import copy
from collections.abc import Mapping


def merge(base: dict, layer: Mapping) -> None:
    """Put the keys of `layer` into `base`. Groups are merged key by key; lists are replaced whole."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def changed(settings: Mapping, defaults: Mapping) -> dict:
    """The settings that differ from their defaults. Only these enter a key, so a new setting changes no key."""
    return {
        name: value for name, value in settings.items() if name not in defaults or value != defaults[name]
    }


def without(spec: Mapping, neutral: Mapping[str, object]) -> dict:
    """`spec` without the entries that equal `neutral`, which maps dotted paths to values. `spec` isn't changed."""
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
