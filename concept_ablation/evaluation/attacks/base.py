"""What attacks share: the pictures that they try to bring back, the loss by which they do, and what they learn.

To add an attack, write a file beside this one with an instance called `ATTACK`, list it in `registries.ATTACKS`, and give its budget
in the config below `evaluation.attacks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from concept_ablation.common.errors import UserError
from concept_ablation.common.files import atomic_output, damaged
from concept_ablation.common.hardware import autocast
from concept_ablation.diffusion.delta import METADATA_KEY
from concept_ablation.diffusion.families.base import Frame, family_of
from concept_ablation.diffusion.parking import stay
from concept_ablation.diffusion.placeholders import add_placeholders, filled, placed

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image


class AttackError(UserError):
    """An attack that can't be made or replayed; the message says what to do."""


@dataclass(frozen=True)
class Learned:
    """What an attack learned.

    rows: text encoder -> (tokens, width), the embeddings. words: the same as a text that anybody can type; None: there is none.
    losses: of each step.
    """

    rows: Mapping[str, Tensor]
    words: str | None = None
    losses: Sequence[float] = ()


class Attack:
    """An attack. A subclass has `name`, `learn` and `budget`."""

    name: ClassVar[str]
    replaces_target: ClassVar[bool]
    """Whether what is learned stands in the target's place; else it stands before the prompt."""

    def learn(self, goal: Goal, start: str, settings: Mapping) -> Learned:
        """What brings the goal's pictures back. start: the words that are attacked; settings: the attack's own, from the config."""
        raise NotImplementedError

    def budget(self, settings: Mapping) -> str:
        """Tokens and steps, in a few words."""
        return f"{settings['tokens']} tokens, {settings['steps']} steps of {settings['batch_size']} pictures"


@dataclass
class Goal:
    """Pictures that an attack tries to bring back, and prompts with `roles.MARK`, prompt i for picture i.

    The loss is the network's own: how badly it predicts the noise in these pictures under these prompts. Nothing of the network is
    trained. seed: of the draws of pictures, timesteps and noise, on the CPU.
    """

    pipeline: DiffusionPipeline
    pictures: Sequence[Image]
    prompts: Sequence[str]
    precision: str = "auto"
    seed: int = 0
    generator: torch.Generator = field(init=False)
    frame: Frame = field(init=False)

    def __post_init__(self) -> None:
        stay(self.pipeline)
        self.family, self.device = family_of(self.pipeline), self.pipeline.device
        self.network, self.schedule = (
            self.family.network(self.pipeline),
            self.family.noise_schedule(self.pipeline),
        )
        for part in (self.network, self.pipeline.vae, *self.family.encoders(self.pipeline).values()):
            part.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.frame = (self.pictures[0].height, 0, 0)
        self.latents = torch.cat([self._encode(picture) for picture in self.pictures])

    @torch.no_grad()
    def _encode(self, picture: Image) -> Tensor:
        """(1, channels, cells, cells): the mean of a picture's latents."""
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with autocast(self.precision, self.device):
            moments = self.family.encode_pixels(self.pipeline, pixels.to(self.device))
        return self.family.latents(self.pipeline, moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))

    def draw(self, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Which `size` pictures, at which timesteps, with which noise."""
        generator = generator or self.generator
        places = torch.randint(len(self.pictures), (size,), generator=generator)
        timesteps = self.schedule.draw_timesteps(size, generator)
        noise = torch.randn((size, *self.latents.shape[1:]), generator=generator)
        return places, timesteps.to(self.device), noise.to(self.device)

    def loss(self, rows: Mapping[str, Tensor], drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The mean squared error of the network's prediction, with gradient to `rows`: text encoder -> (tokens, width)."""
        places, timesteps, noise = drawn
        text = add_placeholders(self.pipeline, len(next(iter(rows.values()))))
        prompts = [placed(self.prompts[place], text) for place in places.tolist()]
        latents = self.latents[places.to(self.device)]
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        with filled(self.pipeline, rows):
            conditioning = self.family.encode_prompts(self.pipeline, prompts)
        conditioning = self.family.framed(conditioning, [self.frame] * len(prompts))
        with autocast(self.precision, self.device):
            predicted = self.family.predict(self.network, noisy, timesteps, conditioning)
        return (predicted.float() - self.schedule.target(latents, noise, timesteps).float()).square().mean()

    def tables(self) -> dict[str, Tensor]:
        """Text encoder -> (vocabulary, width), its token embeddings."""
        return {
            name: table.weight.detach().float()
            for name, table in self.family.token_tables(self.pipeline).items()
        }

    def tokens(self, text: str) -> dict[str, list[int]]:
        """Text encoder -> the ids of a text's tokens, at least one, without those of its start and end."""
        found = {}
        for name, tokenizer in self.family.tokenizers(self.pipeline).items():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            found[name] = [number for number in ids if number not in tokenizer.all_special_ids]
            if not found[name]:
                raise AttackError(
                    f"{text!r} has no token that the tokenizer knows, so no attack can start from it"
                )
        return found


def save_learned(path: str | Path, learned: Learned, spec: Mapping) -> None:
    """Write what an attack learned, and the spec that says how it is judged, as safetensors."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.learned": rows.detach().cpu().float().contiguous() for name, rows in learned.rows.items()
    }
    about = {"spec": dict(spec), "words": learned.words, "losses": list(learned.losses)}
    with atomic_output(path) as part:
        save_file(tensors, part, {"format": "pt", METADATA_KEY: json.dumps(about, sort_keys=True)})


def load_learned(path: str | Path) -> tuple[Learned, dict]:
    """What `save_learned` wrote: what was learned, and the spec. Raises AttackError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
            rows = {name.removesuffix(".learned"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Learned(rows, about["words"], about["losses"]), about["spec"]
    except FileNotFoundError:
        raise AttackError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(AttackError, path, f"not what an attack learned ({error})") from error
