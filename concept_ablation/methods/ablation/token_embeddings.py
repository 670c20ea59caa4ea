"""The parameter group `embedding`: rows of the text encoder's token embedding, one for each target token.

Only those rows are parameters, so no gradient, weight decay or optimizer state reaches any other. A delta
names them `text_encoder.token_embedding.<token id>`, (width,) each: a few kilobytes, whatever the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from concept_ablation.diffusion.delta import TOKEN_ROW
from concept_ablation.methods.ablation.settings import TrainingError

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


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


class TokenRows:
    """Trainable rows in place of those that a pipeline's token embedding has for `tokens`.

    `parameters`: token id -> (width,), set to the embedding's values; `original`: the values at the start.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, tokens: Sequence[int]) -> None:
        self.embedding: nn.Embedding = pipeline.text_encoder.get_input_embeddings()
        weight = self.embedding.weight
        self.tokens = torch.tensor(list(tokens), dtype=torch.long, device=weight.device)
        self.original = weight.detach()[self.tokens].clone()
        self.parameters = {token: nn.Parameter(weight.detach()[token].clone()) for token in tokens}

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The rows by their names in a delta."""
        return {f"{TOKEN_ROW}{token}": row for token, row in self.parameters.items()}

    @contextlib.contextmanager
    def active(self, original: bool = False) -> Iterator[None]:
        """Inside, the embedding gives these rows, with their gradient, or the `original` ones, without."""

        def replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            rows = self.original if original else torch.stack(list(self.parameters.values()))
            found = inputs[0].unsqueeze(-1) == self.tokens
            return torch.where(found.any(-1, keepdim=True), rows[found.int().argmax(-1)], output)

        hook = self.embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def write(self) -> None:
        """Put the rows' values into the embedding."""
        for token, row in self.parameters.items():
            self.embedding.weight[token] = row
