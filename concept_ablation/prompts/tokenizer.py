"""Read prompts with a text-to-image model's tokenizer. Needs the `tokenizers` library, but no torch or transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from concept_ablation.common.errors import UserError


class TokenizerError(UserError):
    """A model's tokenizer is missing or can't be read; the message says what to do."""


class Tokens:
    """A model's tokenizer. `limit`: the number of tokens that the model reads, with those of begin and end.

    Each word is encoded once and alone. That gives the same tokens as the whole prompt, since no token spans two words.
    """

    def __init__(self, tokenizer, limit: int, ends: int, unknown: int | None, merges: bool) -> None:
        self.limit, self._ends = limit, ends
        self._unknown_token, self._merges = unknown, merges
        self._words = _Cache(lambda word: tuple(tokenizer.encode(word, add_special_tokens=False).ids))
        self._lengths = _Cache(lambda word: len(self._words[word]))
        self._parts = _Cache(self.count)

    def count(self, prompt: str) -> int:
        """How many tokens `prompt` has, begin and end included."""
        return sum(map(self._lengths.__getitem__, prompt.split())) + self._ends

    def read(self, prompt: str) -> list[int]:
        """The tokens of `prompt` that the model reads, without begin and end."""
        return [token for word in prompt.split() for token in self._words[word]][: self.limit - self._ends]

    def too_many(self, prompt: str, part: str = "") -> bool:
        """Whether `prompt` has more tokens than the model reads.

        Two shortcuts: every token has at least a letter, so a short prompt isn't counted; and if `prompt` contains
        `part`, which other prompts share, only the rest is counted.
        """
        if len(prompt) <= self.limit - self._ends and prompt.isascii():
            return False
        rest = prompt.replace(part, " ", 1) if part else prompt
        if len(rest) < len(prompt) and self._parts[part] + self._parts[rest] <= self.limit:
            return False
        return self.count(prompt) > self.limit

    def unknown(self, phrase: str) -> list[tuple[str, int]]:
        """The words of `phrase` that the tokenizer doesn't know, each with its number of tokens.

        A byte-level tokenizer has a token for every byte, but a word that was common in its training is one piece, or
        a few long ones. A word counts as unknown if its pieces have fewer than two letters on average, or if one of
        them is the token for unknown text. Digits (always single tokens) and one or two ASCII letters (initials) are
        not considered.
        """
        words = []
        for word in re.findall(r"[^\W\d_]+", phrase):
            ids = self._words[word]
            spelled = self._merges and 1 < len(ids) and len(word) < 2 * len(ids)
            if self._unknown_token in ids or (spelled and not (word.isascii() and len(word) < 3)):
                words.append((word, len(ids)))
        return words


class _Cache(dict):
    """A dict that computes a missing value from its key."""

    def __init__(self, make: Callable[[str], object]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> object:
        self[key] = value = self._make(key)
        return value


def tokenizer_folder(model: Mapping) -> str:
    """The folder of the pipeline whose tokenizer `model` (`path`, `revision`, `config`) uses. Nothing is downloaded.

    It is the model's own folder; for a hub id its snapshot in this machine's cache; for a single-file checkpoint the
    folder `config`. Raises TokenizerError.
    """
    path, revision, config = model["path"], model.get("revision"), model.get("config")
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        if config and os.path.isdir(config):
            return config
        raise TokenizerError(
            f"{path} is one file, without a tokenizer; set model.config to the folder of a diffusers pipeline of the same build"
        )
    # Imported here, since it takes a tenth of a second.
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "model_index.json", revision=revision)
    except ValueError as error:
        raise TokenizerError(f"{path} is not a folder, a file or a hub id: {error}") from None
    if isinstance(found, str):
        return os.path.dirname(found)
    raise TokenizerError(
        f"{path} is not in this machine's cache ({constants.HF_HUB_CACHE}); `hf download {path} --revision {revision}` gets it"
    )


def load_tokens(folder: str | Path) -> Tokens:
    """The tokenizer in `folder`, or in its folder `tokenizer`. Raises TokenizerError.

    Reads `tokenizer.json`, or the `vocab.json` and `merges.txt` of a CLIP tokenizer.
    """
    model = Path(folder)
    place = model / "tokenizer" if (model / "tokenizer").is_dir() else model
    try:
        settings = _json(place / "tokenizer_config.json")
        tokenizer, ends = _tokenizer(place, settings)
        kind = json.loads(tokenizer.to_str())["model"]
        unknown = kind.get("unk_token")
        unknown = kind.get("unk_id") if unknown is None else tokenizer.token_to_id(str(unknown))
        limit = settings.get("model_max_length") or 0
        if not 0 < limit < 10**6:  # transformers writes 10^30 for "not known"
            limit = _json(model / "text_encoder" / "config.json").get("max_position_embeddings", 77)
    except Exception as error:  # noqa: BLE001 - what the library raises for a broken file
        reason = " ".join(str(error).split())
        raise TokenizerError(
            f"{place} holds no readable tokenizer ({reason}); a tokenizer.json, or a vocab.json and merges.txt, is needed"
        ) from None
    return Tokens(tokenizer, int(limit), ends, unknown, bool(kind.get("merges", True)))


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _tokenizer(place: Path, settings: Mapping):
    """The tokenizer in the folder `place`, and the number of begin and end tokens that it adds."""
    from tokenizers import Tokenizer

    if (place / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, tokenizer.num_special_tokens_to_add(False)
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    vocabulary, merges = models.BPE.read_file(str(place / "vocab.json"), str(place / "merges.txt"))
    unknown = settings.get("unk_token", "<|endoftext|>")
    unknown = unknown if isinstance(unknown, str) else unknown["content"]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer, 2
