"""Which versions of packages are installed, without importing them."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

from concept_ablation import __version__

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pyarrow", "snakemake")


@functools.cache
def versions() -> dict[str, str | None]:
    """This project's version, Python's, and those of PACKAGES; None for what isn't installed."""
    found: dict[str, str | None] = {"concept_ablation": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
