"""How near words are to a text-to-image model, without torch: by the token embeddings of its text encoder.

A word's encoding is the mean of its tokens' embeddings. It knows no context, but takes microseconds, and most of the words that it
calls nearest are those of the whole encoder (docs/report.md gives the share). numpy is imported when it is first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from concept_ablation.prompts.tokenizer import TokenizerError, Tokens, load_tokens

if TYPE_CHECKING:
    import numpy as np

LENGTH = 4000
"""Encodings are rounded to whole numbers at this length. A float32 holds all whole numbers up to 2^24 > LENGTH^2, so their products are
exact in any order of adding: every machine finds the same neighbors, and names work by the same key."""
CHUNK = 256  # encodings that are compared with all others at once
SPARSE = 16  # one in so many words is sorted, to see which of the others can be among the nearest
TABLE = (
    "token_embedding.weight",
    "embed_tokens.weight",
    "shared.weight",
)  # what encoders call it: CLIP, Llama, T5
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Encodings:
    """Encodings of some words, `rows` (n, d): whole numbers as float32, of length LENGTH or, without a known token, 0."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def compare(self, groups: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """For each group of words, by number, how near every word is to the nearest of them: (n,), at most about LENGTH^2."""
        import numpy as np

        for start in range(0, len(groups), CHUNK):
            part = groups[start : start + CHUNK]
            ends = np.cumsum([0, *map(len, part)])
            found = self.rows[[number for group in part for number in group]] @ self.rows.T
            yield from (found[first:last].max(axis=0) for first, last in pairwise(ends))


class Alphabet:
    """What stands for encodings where a model has none to be read: nearest is what comes next in the order of the words."""

    def __init__(self, count: int) -> None:
        self.count = count

    def compare(self, groups: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """As `Encodings.compare`, from the first word of each group."""
        import numpy as np

        places = np.arange(self.count)
        return (-((places - group[0]) % self.count) for group in groups)


def encode_words(folder: str | Path, words: Sequence[str]) -> Encodings | None:
    """The encodings of words by the model in a pipeline's folder; None if it has no text encoder that can be read."""
    import numpy as np

    try:
        table = _token_table(Path(folder) / "text_encoder" / "model.safetensors")
        means = _means(table, load_tokens(folder), words)
    except (OSError, ValueError, KeyError, IndexError, StopIteration, TokenizerError):
        return None
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return Encodings(np.rint(LENGTH * means / np.where(lengths > 0, lengths, 1)).astype(np.float32))


def choose_nearest(
    near: Encodings | Alphabet,
    targets: Sequence[Sequence[int]],
    peers: Sequence[Sequence[int]],
    taken: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> list[list[int]]:
    """For each row its `counts` nearest words among its peers, then as many among all others; words are numbers.

    targets: what nearness is to, at least one word a row. peers: sorted. taken: words that aren't chosen.
    """
    import numpy as np

    chosen: list[list[int]] = []
    for values, own, without, count in zip(near.compare(targets), peers, taken, counts, strict=True):
        gone = set(without)
        first = _nearest(values, np.asarray([number for number in own if number not in gone], int), count)
        gone.update(first)
        among = _promising(values, count + len(gone))
        chosen.append([*first, *_nearest(values, among[~np.isin(among, list(gone))], count)])
    return chosen


def _promising(values: np.ndarray, count: int) -> np.ndarray:
    """The numbers of some words, sorted, that hold the `count` nearest and those as near as the last of them.

    The `count`-th largest of every 16th value is at most that of all values, so what lies below it needn't be sorted.
    """
    import numpy as np

    some = values[::SPARSE]
    if not 0 < count <= len(some):
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(some, len(some) - count)[len(some) - count])


def _nearest(values: np.ndarray, among: np.ndarray, count: int) -> list[int]:
    """The `count` words of `among` (sorted) with the largest values, the largest first; of equal ones the first."""
    import numpy as np

    return among[np.argsort(-values[among], kind="stable")][:count].tolist()


def _means(table: np.ndarray, tokens: Tokens, words: Sequence[str]) -> np.ndarray:
    """The mean embeddings of the words' tokens, (n, d) float64; zeros for a word without tokens."""
    import numpy as np

    read = [tokens.read(word) for word in words]
    means = np.zeros((len(words), table.shape[1]))
    full = [number for number, found in enumerate(read) if len(found)]
    for start in range(0, len(full), CHUNK):
        part = full[start : start + CHUNK]
        lengths = [len(read[number]) for number in part]
        found = table[[token for number in part for token in read[number]]]
        if found.dtype == np.uint16:  # bfloat16: the upper half of a float32
            found = (found.astype(np.uint32) << 16).view(np.float32)
        sums = np.add.reduceat(found.astype(np.float64), np.cumsum([0, *lengths[:-1]]))
        means[part] = sums / np.asarray(lengths)[:, None]
    return means


def _token_table(path: Path) -> np.ndarray:
    """The token embeddings of a text encoder, (tokens, d), of which only what is used is read."""
    import numpy as np

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 10**8:
            raise ValueError(f"{path}: no safetensors file")
        header = json.loads(file.read(length))
    entry = header[next(name for name in header if name.endswith(TABLE))]
    offset = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, TYPES[entry["dtype"]], "r", offset, tuple(entry["shape"]))
