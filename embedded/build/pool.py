"""A pool of pictures with their scenes, in shards on disk: shard k is drawn from seed k, so it can be made again."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np

from .render import SIZE, Glyphs, render
from .world import Scene, draw_scene

SHARD = 2048  # pictures


def scenes_of(shard: int) -> list[Scene]:
    """The scenes of a shard, in order."""
    rng = random.Random(f"scenes {shard}")
    return [draw_scene(rng) for _ in range(SHARD)]


def pictures_of(shard: int, glyphs: Glyphs) -> np.ndarray:
    """The pictures of a shard, (SHARD, SIZE, SIZE, 3) uint8."""
    rng = random.Random(f"pictures {shard}")
    return np.stack([np.asarray(render(scene, glyphs, rng)) for scene in scenes_of(shard)])


def stored_pictures(shard: int, cache: Path, glyphs: Glyphs) -> np.ndarray:
    """The pictures of a shard, memory-mapped from the cache; rendered first if they are not there."""
    path = cache / f"pictures-{SIZE}-{shard}.npy"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, pictures_of(shard, glyphs))
        os.replace(part, path)
    return np.load(path, mmap_mode="r")
