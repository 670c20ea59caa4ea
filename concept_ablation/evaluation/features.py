"""What all extractors of features share: batches, vectors of length 1, their error."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from concept_ablation.common.errors import UserError


class FeatureError(UserError):
    """A scorer or descriptor can't be loaded; the message says what is missing and what to do."""


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; reads no further ahead than one batch."""
    if size < 1:
        raise ValueError(f"batch size {size}: must be 1 or more")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def normalised(chunks: list[Tensor]) -> np.ndarray:
    if not chunks:
        raise ValueError("no images or texts given: there is nothing to compute features of")
    return F.normalize(torch.cat(chunks).float(), dim=-1).cpu().numpy()
