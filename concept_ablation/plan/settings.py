"""The settings of one row: the config, then what its kind, its preset and its own columns replace.

A *layer* holds some keys of the sections in SECTIONS. Later layers win: the config's sections, the kind's own defaults, `kinds[kind]`,
`presets[preset]`, `presets[preset].kinds[kind]`, the row's columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from concept_ablation.common.errors import UserError, did_you_mean, show
from concept_ablation.common.settings import merge
from concept_ablation.plan.concept import SECTIONS
from concept_ablation.registries import KINDS, METHODS


class SettingsError(UserError):
    """A row asks for settings that the config doesn't have; the message says what is allowed."""


def shared_settings(config: Mapping, kind: str, preset: str | None) -> dict:
    """The sections as they hold for all rows of a kind and preset, a fresh copy. Raises SettingsError."""
    name = preset or config["preset"]
    presets = config["presets"]
    if name not in presets:
        allowed = ", ".join(presets)
        raise SettingsError(
            f"preset {show(name)} is unknown{did_you_mean(name, presets)} (allowed: {allowed})"
        )
    preset = presets[name]
    own = {section: copy.deepcopy(config[section]) for section in SECTIONS}
    # A method's own settings have their defaults in its file, not in the config.
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
    """`settings` with a row's values by dotted path. Only the groups on the way are copied: change none of the others."""
    own = dict(settings)
    for path, value in overrides.items():
        part, (*groups, last) = own, path.split(".")
        for group in groups:
            part[group] = dict(part[group])
            part = part[group]
        part[last] = value
    return own
