"""What depends on a model's architecture: how it is loaded, conditioned, trained, sampled and named.

A new family is a file beside this one, with an instance called `FAMILY`, and a line in `registries.FAMILIES` under the
class name of its pipeline. Nothing else in this package names a pipeline's class, network, text encoder or tokenizer.
Nothing here or at the top of such a file imports torch: the plan asks a family what it can't do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from concept_ablation.common.errors import UserError
from concept_ablation.common.needs import NEEDS, Need
from concept_ablation.diffusion.compvis import LayoutError
from concept_ablation.registries import FAMILIES

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor, nn

ParameterGroup = Literal["cross-attn", "attn", "full-weight", "embedding", "single-attn"]
"""`cross-attn`: what projects the text to keys and values (the paper's choice for styles and objects); `attn`: queries, keys, values and output
projections of all attention layers; `full-weight`: the whole network; `embedding`: nothing of the network, but rows of the text encoders'
token embeddings; `single-attn`: keys and values where text and picture share them."""

Frame = tuple[int, int, int]
"""What a square picture is of a larger one, in pixels: that one's side before it was enlarged, then how far from its top and its left the
picture was cut. A whole picture of side 512 is (512, 0, 0)."""


class ModelError(UserError):
    """A model that can't be loaded or used; the message says which and what to do."""


@dataclass(frozen=True)
class Conditioning:
    """What a network is told of n prompts. `conditioning[2:4]` are those of two of them.

    `hidden`: (n, tokens, width), the text encoders' hidden states. `pooled`: (n, width), one vector a prompt, where the
    network takes one. `time_ids`: (n, numbers), sizes and crops, where it takes them.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, part: slice) -> Conditioning:
        return Conditioning(*(None if value is None else value[part] for value in self._values()))

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """The conditionings of all `parts`' prompts, in order; at least one part, all of one family."""
        import torch

        columns = zip(*(part._values() for part in parts), strict=True)
        return Conditioning(*(None if values[0] is None else torch.cat(values) for values in columns))

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning(*(None if value is None else value.to(device) for value in self._values()))

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


class NoiseSchedule:
    """How training adds noise to latents, and what the network should predict then.

    Latents, noise and predictions: (n, channels, cells, cells); timesteps: (n,), as the network takes them.
    """

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) random timesteps, on the CPU, by the family's own density: one call of `generator`."""
        raise NotImplementedError

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents at `timesteps`."""
        raise NotImplementedError

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict of the noisy latents: the noise, or a velocity. Raises ModelError."""
        raise NotImplementedError


class Family:
    """Models of one architecture. A subclass sets the attributes below and overrides what raises NotImplementedError."""

    title: ClassVar[str]
    """What messages call such a model."""
    tag: ClassVar[str] = "stable-diffusion"
    """What a model card is found by."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """What the pipeline's class is told, beside the usual, when it loads a folder or a single file."""
    network_name: ClassVar[str]
    """The pipeline's component that predicts; the prefix of its parameters in a delta."""
    text_encoders: ClassVar[Mapping[str, str]]
    """The pipeline's text encoders, each with its tokenizer, by the names of the components."""
    parked: ClassVar[tuple[str, ...]] = ()
    """Those of them that are on a GPU only while they encode (diffusion/parking.py)."""
    groups: ClassVar[Mapping[ParameterGroup, re.Pattern[str]]]
    """Group -> what the names of its parameters in the network match, the smallest group first; without `embedding`."""
    schedulers: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]]
    """A sampler's name in the config -> diffusers' class, and what it is told beyond the model's own schedule."""
    latent_sampler: ClassVar[str] = "ddim"
    """Which of these a method samples latents with, step by step, when it needs some of the target."""
    lacks: ClassVar[Mapping[Need, str]] = {}
    """What methods and attacks can ask of a family and this one hasn't -> why, and what is there instead."""

    # Loading

    def pipeline_class(self) -> type[DiffusionPipeline]:
        """diffusers' class, imported here: that takes seconds."""
        raise NotImplementedError

    def options(self, path: str) -> dict[str, Any]:
        """What the pipeline's class is told when it loads `path`: `load_options`, and what is to be left out of a folder."""
        return dict(self.load_options)

    def precisions(self, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
        """In what the weights are held on a device: one for all, or by component with a `default`. Trained ones are fp32."""
        import torch

        return torch.float32

    def prepare(self, pipeline: DiffusionPipeline) -> None:
        """Whatever makes a loaded pipeline faster on its device without another result than rounding."""

    # Components

    def network(self, pipeline: DiffusionPipeline) -> nn.Module:
        """The denoising network."""
        return getattr(pipeline, self.network_name)

    def encoders(self, pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
        """The text encoders that `pipeline` has, by their component's name."""
        found = {name: getattr(pipeline, name, None) for name in self.text_encoders}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def tokenizers(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """The tokenizer of each text encoder that `pipeline` has, by the encoder's name."""
        return {name: getattr(pipeline, self.text_encoders[name]) for name in self.encoders(pipeline)}

    def token_tables(self, pipeline: DiffusionPipeline) -> dict[str, nn.Embedding]:
        """The token embedding, (vocabulary, width), of each text encoder, by the encoder's name."""
        return {name: _token_table(encoder) for name, encoder in self.encoders(pipeline).items()}

    # Encoding and prediction

    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of `prompts`, on the pipeline's device, with gradient where the text encoders have one."""
        raise NotImplementedError

    def unconditional(self, pipeline: DiffusionPipeline) -> Conditioning:
        """What guidance sets against a prompt, of length 1: the empty prompt, as the model's pipeline has it."""
        return self.encode_prompts(pipeline, [""])

    def framed(self, conditioning: Conditioning, frames: Sequence[Frame]) -> Conditioning:
        """The conditioning of n prompts for n pictures that are cut so; the same for a network that isn't told."""
        return conditioning

    def latent_channels(self, pipeline: DiffusionPipeline) -> int:
        """Channels of the latents; their sides are those of the pixels divided by `pipeline.vae_scale_factor`."""
        return pipeline.vae.config.latent_channels

    def encode_pixels(self, pipeline: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Moments of the VAE's posterior, (n, 2 x channels, cells, cells), means and log variances, of pixels (n, 3, height, width) in [-1, 1]."""
        return pipeline.vae.encode(pixels).latent_dist.parameters.float()

    def latents(self, pipeline: DiffusionPipeline, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents as the network takes them, (n, channels, cells, cells): drawn from the posterior with `noise`."""
        raise NotImplementedError

    def predict(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The network's prediction, of the shape of `noisy`: (n, channels, cells, cells)."""
        raise NotImplementedError

    def noise_schedule(self, pipeline: DiffusionPipeline) -> NoiseSchedule:
        """The schedule that the model was trained on."""
        raise NotImplementedError

    def sample(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        sampler: Mapping[str, Any],
        negative_prompt: str | None,
    ) -> list[Image]:
        """One RGB image a prompt, each from its own generator. `sampler`: as for `sampler.sample_images`."""
        return pipeline(
            list(prompts),
            num_inference_steps=sampler["steps"],
            generator=list(generators),
            **{name: sampler[name] for name in ("guidance_scale", "height", "width")},
            **self.sampling_options(sampler, [negative_prompt] * len(prompts) if negative_prompt else None),
        ).images

    def sampling_options(self, sampler: Mapping[str, Any], negative: list[str] | None) -> dict[str, Any]:
        """What the pipeline is told beside that; negative: a prompt for each picture. Raises ModelError for what it can't take."""
        return {"negative_prompt": negative}

    # Parameters

    def trainable_parameters(self, network: nn.Module, group: ParameterGroup) -> dict[str, nn.Parameter]:
        """The network's parameters of `group`, by their name there, in its order; none for `embedding`.

        Raises ModelError for a group that the family hasn't.
        """
        if group == "embedding":
            return {}
        if group not in self.groups:
            raise ModelError(
                f"parameter group {group!r} is unknown (allowed: {', '.join([*self.groups, 'embedding'])})"
            )
        pattern = self.groups[group]
        return {name: value for name, value in network.named_parameters() if pattern.search(name)}

    def text_projections(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers that make keys and values, (n, tokens, width), of the text's hidden states, by name."""
        raise NotImplementedError

    @contextlib.contextmanager
    def detach_bos(self, network: nn.Module) -> Iterator[None]:
        """Inside, no gradient flows through the keys and values that the text's first token has in `network`.

        That token (begin-of-text) is the same for every prompt, so moving its keys and values would change what all
        prompts give (reference: its attention processors). Predictions are unchanged.
        """
        from torch import cat

        def detach_first(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return cat((output[:, :1].detach(), output[:, 1:]), dim=1)

        layers = self.text_projections(network).values()
        hooks = [layer.register_forward_hook(detach_first) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mistakes(self, groups: Iterable[str], needs: Mapping[Need, str]) -> Iterator[str]:
        """What is asked of this family and can't be done, and what is allowed.

        groups: parameter groups. needs: each with the setting or method that has it.
        """
        for group in sorted(set(groups) - {*self.groups, "embedding"}):
            yield f"{self.title} has no parameter group {group} (allowed: {', '.join([*self.groups, 'embedding'])})"
        for need, who in needs.items():
            if need in self.lacks:
                yield f"{who} needs {NEEDS[need]}, and {self.title} has none: {self.lacks[need]}"

    # Names in other programs' files

    def own_name(self, pipeline: DiffusionPipeline, name: str) -> str:
        """A parameter's name in `pipeline`, given its name in a delta that older libraries may have written."""
        return name

    def kohya_names(self, pipeline: DiffusionPipeline, layers: Iterable[str]) -> dict[str, str]:
        """A layer's name in the network -> in kohya's LoRA files, for each of `layers`. Raises LayoutError."""
        raise LayoutError(
            f"{self.title} has no names of single layers in kohya's form, which joins queries, keys and values (allowed: lora)"
        )

    def compvis_names(self, pipeline: DiffusionPipeline, names: Iterable[str]) -> dict[str, str]:
        """A parameter's name in a delta -> in CompVis's code, for each of `names`. Raises LayoutError."""
        raise LayoutError(f"{self.title} has no names in CompVis's layout")


def _token_table(encoder: nn.Module) -> nn.Embedding:
    """The module that a text encoder looks tokens up in; T5's has its weights from another, which is never called."""
    inner = getattr(getattr(encoder, "encoder", None), "embed_tokens", None)
    return encoder.get_input_embeddings() if inner is None else inner


def family_named(pipeline_class: str) -> Family:
    """The family whose pipeline's class is called so. Raises ModelError, which lists those that there are."""
    if pipeline_class not in FAMILIES:
        raise ModelError(
            f"pipeline class {pipeline_class!r} is not supported (allowed: {', '.join(FAMILIES)})"
        )
    return FAMILIES[pipeline_class]


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline, by the name of its class or of one that it inherits from. Raises ModelError."""
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    return family_named(next((name for name in names if name in FAMILIES), names[0]))
