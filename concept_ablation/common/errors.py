"""The base class of errors about a user's mistake, and helpers for their messages."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable


class UserError(ValueError):
    """Something that a user gave can't be used; `str()` says what it is, what is allowed and what to do.

    It is the base class of all errors of this package. Commands print its message alone, without a traceback.
    """


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest allowed word, or an empty string."""
    near = difflib.get_close_matches(str(word).lower(), list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def show(value: object) -> str:
    """A value as an error message shows it: quoted, on one line, at most 80 characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):  # huge, endless, or with keys that JSON can't hold
        text = f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= 80 else text[:77] + "..."
