"""A tiny, randomly initialised open_clip model in a folder, as `local-dir:` wants it.

It knows nothing, but it has everything a real one has (config, weights, tokenizer), so it takes the pipeline
through the scoring stage in milliseconds. The tokenizer spells texts byte by byte: any text works.
"""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTEXT_LENGTH = 64


def make_tiny_clip(folder, image_size: int = 32, embed_dim: int = 16, seed: int = 0) -> Path:
    """Writes the model to `folder` and returns it as a path. The same seed gives the same weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _save_tokenizer(folder)
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "tokenizer",
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"))
    return folder


def _save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges. The end token has the highest id: open_clip pools there."""
    tokens = ["<pad>", "<start>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=special
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=CONTEXT_LENGTH,
    ).save_pretrained(str(folder))
    return len(vocab)
