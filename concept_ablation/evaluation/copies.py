"""The copy descriptor: a small conv net, or SSCD's TorchScript file. Nothing is downloaded."""

import hashlib
import io
import json
import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from concept_ablation.common.parts import timed
from concept_ablation.evaluation.features import FeatureError, batches, normalised

# SSCD as the paper uses it: pixels a side, the similarity above which two pictures are copies, where it is published.
SSCD_SIZE, SSCD_THRESHOLD = 288, 0.5


SSCD_SOURCE = (
    "sscd_imagenet_mixup.torchscript.pt, the paper's, is listed under 'Pretrained models' of the project "
    "https://github.com/facebookresearch/sscd-copy-detection"
)


IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)


IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)


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

    @timed("loading")
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

    @timed("scoring")
    @torch.inference_mode()
    def features(self, images: Iterable[Image.Image], batch_size: int = 64) -> np.ndarray:
        """(n, dim) float32, rows of length 1. Pictures are resized to a square, never cropped."""
        chunks = [
            self.net(torch.stack([self._prepare(image) for image in batch]).to(self.device))
            for batch in batches(images, batch_size)
        ]
        return normalised(chunks)

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
