"""The settings of one row, merged from layers. A layer sets some keys of the config's SECTIONS, and later layers win.

The layers are, in this order: the config's sections, the kind's own defaults, `kinds[kind]`, `presets[preset]`,
`presets[preset].kinds[kind]`, the row's columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from concept_ablation.common.errors import UserError, did_you_mean, show
from concept_ablation.common.settings import merge
from concept_ablation.plan.concept import SECTIONS
from concept_ablation.registries import KINDS, METHODS


class SettingsError(UserError):
    """A row names a preset that the config doesn't have; the message says what is allowed."""


def shared_settings(config: Mapping, kind: str, preset: str | None) -> dict:
    """The settings of all rows of a kind and preset, as a fresh copy. Raises SettingsError."""
    name = preset or config["preset"]
    presets = config["presets"]
    if name not in presets:
        allowed = ", ".join(presets)
        raise SettingsError(
            f"preset {show(name)} is unknown{did_you_mean(name, presets)} (allowed: {allowed})"
        )
    preset = presets[name]
    own = {section: copy.deepcopy(config[section]) for section in SECTIONS}
    # The defaults of a method's own settings are in its file, not in the config.
    methods = {name: dict(METHODS[name].defaults) for name in METHODS}
    merge(methods, own["method"])
    own["method"] = methods
    for layer in (
        KINDS[kind].defaults,
        config["kinds"].get(kind),
        preset,
        (preset.get("kinds") or {}).get(kind),
    ):
        for section in SECTIONS:
            merge(own[section], (layer or {}).get(section) or {})
    return own


def with_own(settings: Mapping, overrides: Mapping[str, object]) -> dict:
    """`settings` with a row's values, given by dotted path. Other groups aren't copied, so don't change the result."""
    own = dict(settings)
    for path, value in overrides.items():
        part, (*groups, last) = own, path.split(".")
        for group in groups:
            part[group] = dict(part[group])
            part = part[group]
        part[last] = value
    return own
