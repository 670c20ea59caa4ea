"""The words that a model's text encoder knows: what a merged model preserves beside the prompts that rows name.

A row can name a few neighbors, and nobody can name all that a model draws. Its tokenizer's vocabulary can: byte-pair merges are
learned in the order of how often a text has them, so the first whole words are the most frequent ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_ablation.common.progress import progress_bar
from concept_ablation.prompts.wording import with_article

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from concept_ablation.methods.ablation.conditioning import Encoder

SHORTEST = 3
"""Letters of a word, at least. Shorter tokens are rarely words that one draws."""


def frequent_words(tokenizer: PreTrainedTokenizerBase, count: int, without: Iterable[str] = ()) -> list[str]:
    """The tokenizer's first `count` tokens that are whole words of letters, without those in `without`, in any case."""
    skipped, found = {word.lower() for word in without}, {}
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if len(found) == count:
            break
        word = tokenizer.decode([number]).strip()
        if len(word) < SHORTEST or not word.isalpha() or word.lower() in skipped:
            continue
        if tokenizer.tokenize(word) == [token]:  # a part of words isn't
            found[word.lower()] = None
    return list(found)


def words_of_targets(rows: Sequence[Mapping]) -> set[str]:
    """The words of all rows' targets, which are to go: also those of a caption, which came back where its words were preserved."""
    return {word for row in rows for target in row["targets"] for word in target.lower().split()}


def word_tokens(encoder: Encoder, words: Sequence[str]) -> Tensor:
    """(words, tokens, width), float16: what "a picture of a WORD" gives, without begin-of-text, which every prompt has."""
    prompts = [f"a picture of {with_article('a', word)}{word}" for word in words]
    bar = progress_bar(encoder.hidden(prompts), desc="encode_words", unit="batch")
    return torch.cat([hidden[:, 1:].half() for hidden in bar])
