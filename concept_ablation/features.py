"""Image and text features: an open_clip model as the scorer, a small conv net as the copy descriptor.

Everything here turns pictures or texts into L2-normalised float32 vectors, a batch at a time, so that a whole set
of images is never decoded at once. Nothing is downloaded: weights that are not on this machine are an error that
says where to put them.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# SSCD as the paper uses it: pixels a side, the similarity above which two pictures are copies, where it is published.
SSCD_SIZE, SSCD_THRESHOLD = 288, 0.5
SSCD_SOURCE = (
    "sscd_imagenet_mixup.torchscript.pt, the paper's, is listed under 'Pretrained models' of the project "
    "https://github.com/facebookresearch/sscd-copy-detection"
)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class FeatureError(RuntimeError):
    """A scorer or descriptor can't be loaded; the message says what is missing and what to do."""


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

    def __init__(self, model: str | Path, pretrained: str | Path | None = None, device="cpu"):
        self.device = torch.device(device)
        self.model, self.preprocess, self.tokenize = _load_open_clip(str(model), pretrained, self.device)
        self.model.eval().requires_grad_(False)
        short = Path(model).name if Path(model).is_dir() else str(model)
        self.name = f"CLIP {short}" + (f" ({Path(str(pretrained)).name})" if pretrained else "")

    @torch.inference_mode()
    def image_features(self, images: Iterable[Image.Image], batch_size: int = 64) -> np.ndarray:
        """(n, d) float32, rows of length 1. `images` is read lazily, `batch_size` at a time."""
        chunks = [
            self.model.encode_image(
                torch.stack([self.preprocess(i.convert("RGB")) for i in batch]).to(self.device)
            )
            for batch in batches(images, batch_size)
        ]
        return _normalised(chunks)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """(n, d) float32, rows of length 1, in the order of `texts`."""
        chunks = [
            self.model.encode_text(self.tokenize(list(batch)).to(self.device))
            for batch in batches(texts, batch_size)
        ]
        return _normalised(chunks)


class CopyNet(nn.Module):
    """The copy descriptor's network: a residual conv net with generalised-mean pooling.

    Four stages, each halving the side, of `width` x 1, 2, 4, 8 channels; group normalisation, so that a vector does
    not depend on the batch it is computed in. 1.3 M parameters at the default size (2.5 MB in half precision).
    `threshold` is the cosine similarity above which two pictures count as copies; it travels with the weights.
    """

    def __init__(self, width: int = 32, dim: int = 128, image_size: int = 64, threshold: float = 0.5):
        super().__init__()
        self.config = {"width": width, "dim": dim, "image_size": image_size, "threshold": threshold}
        widths = [width * 2**stage for stage in range(4)]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(w_in, w_out) for w_in, w_out in pairwise([width, *widths])))
        self.head = nn.Linear(widths[-1], dim)
        self.power = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, s, s) in [-1, 1] -> (n, dim), rows of length 1."""
        x = self.blocks(self.stem(images))
        power = self.power.clamp(1, 8)
        pooled = F.relu(x).add(1e-4).pow(power).mean((2, 3)).pow(1 / power)
        return F.normalize(self.head(pooled), dim=1)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Writes `config.json` and `model.safetensors` to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        state = {
            name: value.detach().cpu().to(dtype).contiguous() for name, value in self.state_dict().items()
        }
        save_file(state, str(folder / "model.safetensors"))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "CopyNet":
        """Reads what `save` wrote, as float32. Raises FeatureError when a file is missing or does not fit."""
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for path in (config, weights):
            if not path.is_file():
                raise FeatureError(
                    f"copy descriptor: {path} is missing; the folder needs {config.name} and {weights.name}"
                )
        try:
            net = cls(**json.loads(config.read_text(encoding="utf-8")))
            net.load_state_dict({name: value.float() for name, value in load_file(str(weights)).items()})
        except Exception as error:
            raise FeatureError(f"copy descriptor in {folder} can't be read: {error}") from error
        return net


class CopyDescriptor:
    """Says whether one picture is a copy of another: similarity of descriptors above a threshold (Pizzi et al., 2022).

    Args:
        model: a folder with `config.json` and `model.safetensors`, as `CopyNet.save` writes it; or a TorchScript file
            that is called as SSCD's are: (n, 3, 288, 288), ImageNet's mean and deviation -> (n, dim), a copy above 0.5.
        device: "cpu", "cuda", "mps" or a torch device.
        sha256: of a TorchScript file, and required for it: such a file holds code, which runs when it is called.

    Raises:
        FeatureError: a file is missing or can't be read, or isn't the one that `sha256` names.
    """

    def __init__(self, model: str | Path, device="cpu", sha256: str | None = None):
        self.device, path = torch.device(device), Path(model)
        if path.is_dir():
            if sha256 is not None:
                raise FeatureError(
                    f"copy descriptor {path} is a folder: leave `sha256` null, it is of a file"
                )
            net = CopyNet.load(path)
            size, self.threshold = net.config["image_size"], float(net.config["threshold"])
            self._prepare = partial(copy_input, size=size)
        else:
            net, self.threshold, self._prepare = _load_torchscript(path, sha256), SSCD_THRESHOLD, sscd_input
        self.net = net.to(self.device).eval()
        self.name = f"copy descriptor {path.name}"

    @torch.inference_mode()
    def features(self, images: Iterable[Image.Image], batch_size: int = 64) -> np.ndarray:
        """(n, dim) float32, rows of length 1. Pictures are resized to a square, never cropped."""
        chunks = [
            self.net(torch.stack([self._prepare(image) for image in batch]).to(self.device))
            for batch in batches(images, batch_size)
        ]
        return _normalised(chunks)

    def is_copy(self, similarity: np.ndarray | float) -> np.ndarray | bool:
        """True where a cosine similarity is above the threshold."""
        return np.asarray(similarity) > self.threshold


def _load_torchscript(path: Path, sha256: str | None) -> torch.jit.ScriptModule:
    """The module in a TorchScript file, whose hash is checked before any of it is read as code."""
    if not path.is_file():
        raise FeatureError(
            f"copy descriptor: {path} is not there. Use a folder, such as embedded/emoji-copy, or a TorchScript file "
            f"of SSCD, which is not downloaded in a run: {SSCD_SOURCE}"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is None:
        raise FeatureError(
            f"copy descriptor {path}: a TorchScript file holds code, so it is used only if its `sha256` is set. If you "
            f"trust where the file is from, set it to {found}"
        )
    if found != sha256.lower():
        raise FeatureError(
            f"copy descriptor {path}: its SHA-256 is {found}, but {sha256} is wanted: another file, or a damaged one"
        )
    try:
        return torch.jit.load(io.BytesIO(content), map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise FeatureError(f"copy descriptor {path} is no TorchScript file: {reason}") from error


def copy_input(image: Image.Image, size: int) -> Tensor:
    """A picture as the copy net wants it: (3, size, size) float32 in [-1, 1], the whole picture, squeezed to a square."""
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def sscd_input(image: Image.Image) -> Tensor:
    """A picture as SSCD wants it: (3, 288, 288) float32, ImageNet's mean 0 and deviation 1, squeezed to a square."""
    side = (SSCD_SIZE, SSCD_SIZE)
    pixels = np.asarray(image.convert("RGB").resize(side, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_DEVIATION).permute(2, 0, 1)


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; reads no further ahead than one batch."""
    if size < 1:
        raise ValueError(f"batch size {size}: must be 1 or more")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a 1 x 1 shortcut; the first of each halves the side."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        groups = math.gcd(8, channels_out)
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=2)
        self.norm_first = nn.GroupNorm(groups, channels_out)
        self.norm_second = nn.GroupNorm(groups, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm_first(self.first(x)))
        return F.silu(self.norm_second(self.second(hidden)) + self.shortcut(x))


def _normalised(chunks: list[Tensor]) -> np.ndarray:
    if not chunks:
        raise ValueError("no images or texts given: there is nothing to compute features of")
    return F.normalize(torch.cat(chunks).float(), dim=-1).cpu().numpy()


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
