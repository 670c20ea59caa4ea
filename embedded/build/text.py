"""The tokenizer and the diffusion model's text encoder.

The encoder learns from text alone: to tell from a caption's end-of-text state which object, category, style,
background, size and memorized caption it names. Then it is frozen, so that U-Net steps use stored embeddings.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .fit import device, fit, trained
from .world import (
    BACKGROUNDS,
    CATEGORIES,
    CATEGORY_OF,
    MEMORIZED,
    OBJECTS,
    SIZE_WORDS,
    STYLES,
    Scene,
    all_captions,
    caption,
    draw_scene,
)

LENGTH = 32  # tokens
STEPS, BATCH = 600, 64
START, END = "<|startoftext|>", "<|endoftext|>"
# Words that captions of the world do not use but prompts do; they name nothing, and the encoder learns so.
FILLERS = [
    "photo",
    "depicts",
    "image",
    "drawing",
    "painting",
    "of",
    "the",
    "an",
    "with",
    "and",
    "in",
    "by",
    "art",
    "artwork",
    "beautiful",
    "nice",
    "one",
    "some",
    "this",
    "inspired",
    "illustration",
    "showing",
    "shows",
    "emoji",
    "colorful",
    "big",
    "tiny",
    "cute",
    "old",
    "new",
    "very",
    "on",
    "at",
    "for",
    "portrait",
    "print",
    "copy",
    "poster",
    "scene",
]
LABELS = {
    "object": OBJECTS,
    "category": list(CATEGORIES),
    "style": STYLES,
    "background": list(BACKGROUNDS),
    "size": list(SIZE_WORDS),
    "memorized": list(MEMORIZED),
}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a byte-pair tokenizer on the world's captions, complete over bytes so that it takes any text."""
    alphabet = sorted(ByteLevel.alphabet())
    trainer_model = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    trainer_model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500, end_of_word_suffix="</w>", initial_alphabet=alphabet, min_frequency=1
    )
    trainer_model.train_from_iterator([*all_captions(), *FILLERS * 20], trainer)
    learned = json.loads(trainer_model.to_str())["model"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in learned["merges"]]
    names = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=LENGTH,
        pad_token=END,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            projection_dim=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """(n, length) token ids, padded and cut as a Stable Diffusion pipeline does."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def labels_of(scene: Scene) -> dict[str, int]:
    """What the caption of `scene` names: an index into each list of LABELS, or its length for "nothing"."""
    values = {
        "object": scene.object,
        "category": CATEGORY_OF[scene.object],
        "style": scene.look,
        "background": scene.background,
        "size": scene.size,
        "memorized": scene.memorized,
    }
    said = set(scene.said) | ({"memorized"} if scene.memorized else set())
    said |= {"category"} if "object" in said else set()
    return {k: LABELS[k].index(values[k]) if k in said else len(LABELS[k]) for k in LABELS}


def reword(text: str, rng: random.Random) -> str:
    """`text` with words put before, after or between that name nothing: the encoder learns to read past them."""
    if rng.random() < 0.6:
        return text
    words = text.split(" ")
    for _ in range(rng.randint(1, 4)):
        at = rng.choice([0, len(words)])
        words.insert(at, rng.choice(FILLERS) + rng.choice(["", "", "", ","]))
    text = " ".join(words)
    return text.capitalize() if rng.random() < 0.3 else text


class Reader(nn.Module):
    """The encoder with one linear head a label."""

    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({k: nn.Linear(192, len(v) + 1) for k, v in LABELS.items()})


def train_text(cache: Path) -> None:
    """Make `cache/tokenizer` and train the text encoder into `cache/text.pt`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(cache / "tokenizer")
    reader = Reader(new_text_encoder(tokenizer)).to(device())

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [draw_scene(rng) for _ in range(BATCH)]
        texts = [reword(caption(scene, rng), rng) for scene in scenes]
        pooled = reader.encoder(tokens_of(tokenizer, texts).to(device())).pooler_output
        labels = [labels_of(scene) for scene in scenes]
        loss = 0
        for k, head in reader.heads.items():
            truth = torch.tensor([label[k] for label in labels], device=device())
            loss = loss + nn.functional.cross_entropy(head(pooled), truth)
        return loss

    fit("text", reader, loss_of, steps=STEPS, learning_rate=1e-3, cache=cache, ema_decay=0.99)


def load_text(cache: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = CLIPTokenizer.from_pretrained(cache / "tokenizer")
    reader = trained(cache, "text", Reader(new_text_encoder(tokenizer)))
    return tokenizer, reader.encoder.eval()


@torch.no_grad()
def embed(cache: Path, texts: list[str]) -> torch.Tensor:
    """(n, LENGTH, 192) float32 last hidden states, what a pipeline gives its U-Net."""
    tokenizer, encoder = load_text(cache)
    encoder.to(device())
    parts = [
        encoder(tokens_of(tokenizer, texts[i : i + 256]).to(device()))[0] for i in range(0, len(texts), 256)
    ]
    return torch.cat(parts)
