"""Placeholders: tokens without a word, whose embeddings come from outside. A prompt names them in one place, by `MARK`.

Neither the text encoders nor their vocabularies change: the embeddings are put in while a context is open.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concept_ablation.common.roles import MARK
from concept_ablation.diffusion.families.base import family_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def placed(prompt: str, text: str) -> str:
    """`prompt` with `text` in the place of `MARK`."""
    return re.sub(re.escape(MARK), lambda match: text, prompt, flags=re.IGNORECASE).strip()


def add_placeholders(pipeline: DiffusionPipeline, count: int) -> str:
    """Let the pipeline's tokenizers know `count` placeholders; returns the text that stands for all of them, for `placed`."""
    names = [f"<learned{number}>" for number in range(count)]
    for tokenizer in family_of(pipeline).tokenizers(pipeline).values():
        tokenizer.add_tokens(names)
    return " ".join(names)


@contextlib.contextmanager
def filled(pipeline: DiffusionPipeline, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the placeholders have these embeddings: text encoder -> (count, width), with their gradient."""
    family, hooks = family_of(pipeline), []
    for encoder, values in rows.items():
        names = [f"<learned{number}>" for number in range(len(values))]
        ids = family.tokenizers(pipeline)[encoder].convert_tokens_to_ids(names)
        table = family.token_tables(pipeline)[encoder]
        hooks += _hooks(table, torch.tensor(ids, device=values.device), values)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(table: nn.Embedding, ids: Tensor, rows: Tensor) -> list:
    """What puts `rows` in the output of `table` for the tokens `ids`, which it needn't have."""
    asked: list[Tensor] = []

    def hide(module: nn.Module, inputs: tuple) -> tuple:
        asked[:] = inputs[:1]
        return (inputs[0].clamp(max=table.num_embeddings - 1), *inputs[1:])

    def put(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        found = asked[0].unsqueeze(-1) == ids
        return torch.where(found.any(-1, keepdim=True), rows[found.int().argmax(-1)].to(output), output)

    return [table.register_forward_pre_hook(hide), table.register_forward_hook(put)]
