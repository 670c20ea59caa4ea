"""Merging: one change of a model's weights in place of several, which were trained apart from the same weights.

A change D = W - W_0 has the names and shapes of the weights. Of linear layers, (out, width), the *closed form* takes the one that
does to each row's own tokens what that row's change D_i does, and to preserved tokens nothing. With second moments C (the mean of
h h^T over tokens h, as `preservation.second_moment` gives it) it is the least of

    sum_i w_i tr (D - D_i) C_i (D - D_i)^T  +  m tr D C_P D^T  +  l |D|^2
    D = (sum_i w_i D_i C_i) (sum_i w_i C_i + m C_P + l I)^-1

tr (D - D_i) C_i (D - D_i)^T is the mean of |(D - D_i) h|^2 over a row's tokens. m and l are given without scale: m = `preserve_weight`
x sum_i w_i, so that at 1 all preserved tokens count as much as all rows'; l = `ridge` x the mean eigenvalue of the rows' mean
moment, so that it weighs the same against one of two rows or of a thousand. Concept Editing (UCE, Gandikota et al., 2024) and
MACE (Lu et al., 2024) solve systems of this form.

Two things keep what no row names. *Words*: C_P is then the mean of two moments, of the preserved tokens and of the words of a
vocabulary. Those that would move most weigh most: each of `ROUNDS` rounds solves the system, and multiplies a word's weight with the
square root of how far it moves, |D h|^2 in the mean over its tokens. Where all words of weight move alike, the farthest moves least. *Reach*: what
pulls D back to 0 also shortens it along the rows' own changes. So D is scaled until sum_i w_i tr D C_i D_i^T is `reach` times what it is of the rows' own.

Sums are the other way (task arithmetic, Ilharco et al., 2023), and TIES (Yadav et al., 2023). Each reads a delta's tensors one by
one, adds them up in float64 and forgets them, so that memory doesn't grow with the number of deltas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 4
"""Rounds in which the words' weights are found. Of 45 rows the farthest word moved .83, .66, .53, .44 and .41 of a row's change after 0, 1, 2, 4 and 8."""
WORDS_AT_ONCE = 256  # as float64 120 MB of Stable Diffusion's

Change = Iterable[tuple[str, Tensor]]
"""A change's tensors by name, which may be read one by one."""


@dataclass(frozen=True)
class Fit:
    """How near a closed form comes to what it was asked for, as shares of the rows' own changes (0: exact).

    lost: root mean square of (D - D_i) h over the rows' tokens, over that of D_i h. moved: the same of D h over preserved tokens.
    """

    lost: float
    moved: float


class ClosedForm:
    """The sums that the closed form needs, which rows are added to one after the other."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}  # sum_i w_i D_i C_i, (out, width)
        self.moment: Tensor | None = None  # sum_i w_i C_i
        self.weight = self.energy = 0.0  # sum_i w_i, and that of w_i tr D_i C_i D_i^T

    def add(self, change: Change, moment: Tensor, weight: float = 1.0) -> None:
        """Add a row: its change, whose tensors are (out, width), and its tokens' second moment, (width, width), float64."""
        self.moment = weight * moment if self.moment is None else self.moment + weight * moment
        self.weight += weight
        for name, own in change:
            own = own.to(moment)
            product = weight * (own @ moment)
            self.energy += float((product * own).sum())
            self._sum(name, product)

    def _sum(self, name: str, product: Tensor) -> None:
        if name in self.outputs:
            self.outputs[name] += product
        else:
            self.outputs[name] = product

    def solve(
        self,
        preserved: Tensor | None,
        preserve_weight: float,
        ridge: float,
        words: Tensor | None = None,
        reach: float | None = None,
    ) -> tuple[dict[str, Tensor], Fit]:
        """The merged change, float64, and how near it comes; the sums are gone then.

        preserved: the second moment of what is to stay, None: nothing is. words: (words, tokens, width), the encodings of as many
        words that are to stay, too. ridge > 0. reach: see above, None: D as it is. Raises ValueError without a row.
        """
        if self.moment is None:
            raise ValueError("no rows to merge")
        system = self.moment.clone()
        system.diagonal().add_(ridge * float(self.moment.trace()) / self.weight / len(system))
        weight, gram = preserve_weight * self.weight, sum(own.T @ own for own in self.outputs.values())
        if words is not None and len(words):
            preserved = _with_words(system, gram, preserved, weight, words)
        if preserved is not None:
            system += weight * preserved
        factor = torch.linalg.cholesky(system)
        along = float((gram * torch.cholesky_inverse(factor)).sum())
        size = reach * self.energy / along if reach is not None and along else 1.0
        merged, lost, moved = {}, self.energy, 0.0
        for name in list(self.outputs):
            wanted = self.outputs.pop(name)
            own = merged[name] = size * torch.cholesky_solve(wanted.T, factor).T.contiguous()
            lost += float(((own @ self.moment - 2 * wanted) * own).sum())
            moved += 0.0 if preserved is None else float(((own @ preserved) * own).sum())
        # Rounding may leave an exact merge a loss below 0.
        shares = (max(part, 0.0) / (self.energy or 1.0) for part in (lost, moved * self.weight))
        return merged, Fit(*map(math.sqrt, shares))


def _with_words(
    system: Tensor, gram: Tensor, preserved: Tensor | None, weight: float, words: Tensor
) -> Tensor:
    """The second moment of what is preserved and of the words, these weighted so that none moves much farther than others.

    system: what is solved without them. gram: (width, width), the sum of G^T G over the layers' outputs G = sum_i w_i D_i C_i.
    """
    shares = torch.full((len(words),), 1 / len(words), dtype=torch.float64, device=system.device)
    for _ in range(ROUNDS):
        kept = _mean(preserved, weighted_moment(words, shares))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system + weight * kept))
        shares *= moved_by(words, inverse @ gram @ inverse).sqrt()
        shares /= shares.sum()
    return _mean(preserved, weighted_moment(words, shares))


def _mean(preserved: Tensor | None, words: Tensor) -> Tensor:
    return words if preserved is None else (preserved + words) / 2


def weighted_moment(words: Tensor, shares: Tensor) -> Tensor:
    """(width, width) float64: the sum over words (n, tokens, width) of their share times the mean of h h^T over their tokens."""
    total = torch.zeros(words.shape[2], words.shape[2], dtype=torch.float64, device=shares.device)
    for block, own in zip(words.split(WORDS_AT_ONCE), shares.split(WORDS_AT_ONCE), strict=True):
        tokens = block.to(shares) * own.sqrt()[:, None, None]
        total += tokens.flatten(0, 1).T @ tokens.flatten(0, 1)
    return total / words.shape[1]


def moved_by(words: Tensor, gram: Tensor) -> Tensor:
    """(n,) float64: how far each word moves under a change D of Gram matrix D^T D, as the mean of |D h|^2 over its tokens."""
    blocks = (block.to(gram) for block in words.split(WORDS_AT_ONCE))
    return torch.cat([((block @ gram) * block).sum(-1).mean(-1) for block in blocks])


def add_up(changes: Iterable[Change]) -> dict[str, Tensor]:
    """The sum of all changes, float64. A change counts as 0 where it lacks a tensor."""
    total: dict[str, Tensor] = {}
    for change in changes:
        for name, own in change:
            total[name] = total[name].add_(own) if name in total else own.to(torch.float64, copy=True)
    return total


def ties(read: Callable[[], Iterable[Change]], density: float) -> dict[str, Tensor]:
    """Trim, elect signs, and average what agrees (TIES), float64. `read` is called twice, for as many passes over all changes.

    Of each tensor the share `density` of its values stays that are largest in size. An element's sign is that of the sum of what
    stays, and its value the mean of those with this sign. As peft's `merge_utils.ties` with equal weights, tested against it.
    """
    totals, counts = add_up(_trimmed(read(), density)), {}
    signs = {name: torch.where(total >= 0, 1.0, -1.0) for name, total in totals.items()}
    merged = {name: total.zero_() for name, total in totals.items()}
    for change in _trimmed(read(), density):
        for name, own in change:
            agrees = own.sign() == signs[name]
            merged[name] += own * agrees
            counts[name] = counts.get(name, 0) + agrees.int()
    return {name: value / counts[name].clamp(min=1) for name, value in merged.items()}


def _trimmed(changes: Iterable[Change], density: float) -> Iterable[Change]:
    return (((name, trim(own, density)) for name, own in change) for change in changes)


def trim(tensor: Tensor, density: float) -> Tensor:
    """The tensor with zeros for all but its int(density x n) values that are largest in size."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def join(changes: Sequence[Change]) -> dict[str, Tensor]:
    """All tensors of changes that have none in common. Raises ValueError for a name that occurs twice."""
    joined: dict[str, Tensor] = {}
    for change in changes:
        for name, own in change:
            if name in joined:
                raise ValueError(name)
            joined[name] = own
    return joined
