"""The parameter group `embedding`: rows of the text encoders' token embeddings, one for each target token.

Only those rows are parameters, so no gradient, weight decay or optimizer state reaches any other. A delta names them
`<text encoder>.token_embedding.<token id>`, (width,) each: a few kilobytes, whatever the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.delta import token_row_name
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.parking import stay
from concept_ablation.methods.ablation.settings import TrainingError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def target_tokens(tokenizer: Any, targets: Sequence[str], anchor: str) -> list[int]:
    """The ids of the tokens to train, sorted: of every target, every token that the anchor doesn't share.

    "pouting cat" -> "cat" trains "pouting" alone, as moving "cat" would move the anchor, which is to stay.
    A target that shares all its tokens with the anchor trains all of them. Start, end and padding are never
    trained. Tokens of other forms of a word, such as its plural, aren't either. Raises TrainingError
    for a target without a token.
    """

    def tokens(text: str) -> set[int]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return set(ids) - set(tokenizer.all_special_ids)

    chosen: set[int] = set()
    for target in targets:
        own = tokens(target)
        if not own:
            raise TrainingError(f"the target {target!r} has no token that the tokenizer knows")
        chosen |= own - tokens(anchor) or own
    return sorted(chosen)


class TrainableTokenEmbeddings:
    """Trainable rows in place of those that a pipeline's token embeddings have for some tokens.

    `tokens`: by text encoder, the ids of the tokens to train. `parameters`: a row's name in a delta -> (width,), which
    starts from the embedding's values. While the rows train, the pipeline's own embeddings stay as they are until `write`.
    """

    def __init__(self, pipeline: DiffusionPipeline, tokens: Mapping[str, Sequence[int]]) -> None:
        stay(pipeline)
        tables = family_of(pipeline).token_tables(pipeline)
        self._rows = [_Rows(encoder, tables[encoder], ids) for encoder, ids in tokens.items() if ids]
        self.parameters = {name: row for rows in self._rows for name, row in rows.parameters.items()}

    @contextlib.contextmanager
    def active(self, original: bool = False) -> Iterator[None]:
        """Inside, the embeddings give these rows, with their gradient, or the values at the start, without."""
        hooks = [rows.table.register_forward_hook(rows.replacing(original)) for rows in self._rows]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def write(self) -> None:
        """Put the rows' values into the embeddings."""
        for rows in self._rows:
            for token, row in zip(rows.tokens.tolist(), rows.parameters.values(), strict=True):
                rows.table.weight[token] = row


class _Rows:
    """The trainable rows of one token embedding, and what they were at the start."""

    def __init__(self, encoder: str, table: nn.Embedding, tokens: Sequence[int]) -> None:
        self.table = table
        self.tokens = torch.tensor(list(tokens), dtype=torch.long, device=table.weight.device)
        self.original = table.weight.detach()[self.tokens].clone()
        names = [token_row_name(encoder, token) for token in tokens]
        self.parameters = {
            name: nn.Parameter(row.float().clone()) for name, row in zip(names, self.original, strict=True)
        }

    def replacing(self, original: bool) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        """A forward hook of the embedding that puts these rows, or the original ones, in its output."""

        def replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            rows = self.original if original else torch.stack(list(self.parameters.values()))
            found = inputs[0].unsqueeze(-1) == self.tokens
            return torch.where(found.any(-1, keepdim=True), rows[found.int().argmax(-1)].to(output), output)

        return replace
