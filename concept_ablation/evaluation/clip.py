"""CLIP: text and image features of an open_clip model. Nothing is downloaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from concept_ablation.common.parts import timed
from concept_ablation.evaluation.features import FeatureError, batches, normalised

WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


class ClipScorer:
    """Text and image features of an open_clip model.

    Args:
        model: a folder with `open_clip_config.json`, weights and tokenizer (loaded by open_clip's `local-dir:`), or
            the name of an open_clip architecture, such as "ViT-B-32" (the paper's).
        pretrained: for an architecture's name only: a file of weights, or the name of published weights ("openai")
            which are already in the Hugging Face cache of this machine.
        device: "cpu", "cuda", "mps" or a torch device.

    Raises:
        FeatureError: unknown architecture, missing or unreadable weights.
    """

    @timed("loading")
    def __init__(self, model: str | Path, pretrained: str | Path | None = None, device="cpu"):
        self.device = torch.device(device)
        self.model, self.preprocess, self.tokenize = _load_open_clip(str(model), pretrained, self.device)
        self.model.eval().requires_grad_(False)
        short = Path(model).name if Path(model).is_dir() else str(model)
        self.name = f"CLIP {short}" + (f" ({Path(str(pretrained)).name})" if pretrained else "")

    @timed("scoring")
    @torch.inference_mode()
    def image_features(self, images: Iterable[Image.Image], batch_size: int = 64) -> np.ndarray:
        """(n, d) float32, rows of length 1. `images` is read lazily, `batch_size` at a time."""
        chunks = [
            self.model.encode_image(
                torch.stack([self.preprocess(i.convert("RGB")) for i in batch]).to(self.device)
            )
            for batch in batches(images, batch_size)
        ]
        return normalised(chunks)

    @timed("scoring")
    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """(n, d) float32, rows of length 1, in the order of `texts`."""
        chunks = [
            self.model.encode_text(self.tokenize(list(batch)).to(self.device))
            for batch in batches(texts, batch_size)
        ]
        return normalised(chunks)


def _load_open_clip(model: str, pretrained: str | Path | None, device: torch.device):
    import open_clip  # slow to import, and only needed once a model is asked for

    if Path(model).is_dir():
        name, options = f"local-dir:{model}", {}
        if not list(Path(model).glob("open_clip_config.json")):
            raise FeatureError(
                f"scorer {model}: no open_clip_config.json in this folder; open_clip needs it there"
            )
    elif model in open_clip.list_models():
        name, options = model, _named_weights(model, pretrained)
    else:
        known = ", ".join(open_clip.list_models()[:8])
        raise FeatureError(
            f"scorer {model!r} is neither a folder nor an open_clip architecture ({known}, ...)"
        )
    try:
        net, preprocess = open_clip.create_model_from_pretrained(name, device=device, **options)
        return net, preprocess, open_clip.get_tokenizer(name)
    except Exception as error:
        raise FeatureError(f"scorer {model} can't be loaded: {error}") from error


def _named_weights(model: str, pretrained: str | Path | None) -> dict[str, object]:
    """open_clip's options for an architecture's weights: a file, or published weights found in the local cache."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    if pretrained is None:
        raise FeatureError(
            f"scorer {model}: set `pretrained` to a file of weights or the name of published weights"
        )
    if Path(pretrained).is_file():
        return {"pretrained": str(pretrained)}
    published = get_pretrained_cfg(model, str(pretrained))
    if not published:
        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise FeatureError(
            f"scorer {model}: {pretrained!r} is no file and not the name of published weights of it ({tags})"
        )
    return {
        "pretrained": str(_cached_weights(model, str(pretrained), published.get("hf_hub", ""))),
        "force_quick_gelu": published.get("quick_gelu", False),
        "image_mean": published["mean"],
        "image_std": published["std"],
        "image_interpolation": published["interpolation"],
        "image_resize_mode": published["resize_mode"],
    }


def _cached_weights(model: str, tag: str, hub: str) -> Path:
    """The file of published weights in this machine's Hugging Face cache; never downloads."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, filename = hub.rpartition("/")
    for name in [filename] if filename else WEIGHT_NAMES:
        cached = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return Path(cached)
    raise FeatureError(
        f"scorer {model}, weights {tag!r}: not on this machine, and nothing is downloaded during a run. Fetch them once "
        f"with `hf download {repository or '<repository>'}`, or download a file of weights and set `pretrained` to its path"
    )
