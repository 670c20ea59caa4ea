"""One loaded model that draws as the base model, and as any ablated one, at any strength.

The weights are base + s x (change 1 + change 2 + ...), where a change is what a delta makes of the base model's weights. At s = 1 a
single delta gives the very weights that the report's pictures were drawn with, and at s = 0 the base model's: bit for bit, since the
interpolation is exact at both ends. Sampler, noise and prompts are the report's, too; docs/design.md says what is equal to what.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from concept_ablation.diffusion.delta import apply_delta, delta_parameters, delta_shapes
from concept_ablation.diffusion.sampler import sample_images

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

DELTAS = 4 * 2**30  # bytes of deltas that stay in memory: 50 of Stable Diffusion's keys and values
PICTURES = 256 * 2**20  # bytes of pictures: 340 of 512 pixels
T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps what was made last, up to `most` bytes; the newest stays whatever its size. `size` gives a value's bytes."""

    def __init__(self, most: int, size: Callable[[T], int]) -> None:
        self._most, self._size, self._kept = most, size, OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made if it isn't there."""
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(map(self._size, self._kept.values())) > self._most:
            self._kept.popitem(last=False)
        return self._kept[key]


class Studio:
    """Draws pictures by `pipeline`, whose weights it changes. Each delta is read once; threads take turns."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        self._base: dict[
            str, Tensor
        ] = {}  # the base model's values of all that a delta has changed so far, on the CPU
        self._now: dict[str, float] | None = {}  # the changes that the pipeline has; None: unknown
        self._deltas: Recent[dict[str, Tensor]] = Recent(
            DELTAS, lambda delta: sum(value.nbytes for value in delta.values())
        )
        self._pictures: Recent[Image] = Recent(PICTURES, lambda image: 3 * image.width * image.height)
        self._turn = threading.Lock()

    def draw(
        self, prompt: str, seed: int, sampler: Mapping[str, object], changes: Mapping[str, float]
    ) -> Image:
        """The RGB picture of a prompt and a seed with `changes`: a delta's path -> its strength. Without any, the base model's.

        `sampler`: as for `sample_images`. Raises DeltaError, SamplerError, DeviceError.
        """
        key = (prompt, seed, json.dumps(dict(sampler), sort_keys=True), *sorted(changes.items()))

        def make() -> Image:
            self._set(dict(sorted(changes.items())))
            return next(sample_images(self._pipeline, [prompt], [seed], sampler=sampler, batch_size=1))

        with self._turn:
            return self._pictures.get(key, make)

    @torch.no_grad()
    def _set(self, changes: dict[str, float]) -> None:
        """Give the pipeline the base model's weights with `changes`. Raises DeltaError."""
        if changes == self._now:
            return
        self._now = None
        deltas = [
            (self._deltas.get(path, lambda path=path: self._read(path)), s) for path, s in changes.items()
        ]
        own = delta_parameters(self._pipeline, self._base)
        for name, base in self._base.items():
            own[name].copy_(mix(base, [(delta[name], s) for delta, s in deltas if name in delta]))
        self._now = changes

    def _read(self, path: str) -> dict[str, Tensor]:
        """A delta's values, as they are in the pipeline once it is applied, on the CPU. It stays applied."""
        names = delta_shapes(path)
        own = delta_parameters(self._pipeline, names)
        self._base |= {name: _copy(own[name]) for name in names if name in own and name not in self._base}
        apply_delta(self._pipeline, path)
        return {name: _copy(own[name]) for name in names}


def mix(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """base + the sum of s x (value - base) over `parts` (value, s), each of base's shape; base itself without any.

    With one part it is exactly base at s = 0 and exactly the value at s = 1, which a product and a sum needn't be.
    """
    if not parts:
        return base
    (first, strength), *others = parts
    mixed = torch.lerp(base, first, strength)
    for value, strength in others:
        mixed += strength * (value - base)
    return mixed


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
