"""Method `esd`: Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023), training by the model's own negative guidance.

The trained network's prediction for the target is drawn to where the unchanged network's guidance leads away from the target:

    | eps(x_t, c, t) - [ eps_0(x_t, "", t) - eta (eps_0(x_t, c, t) - eps_0(x_t, "", t)) ] |^2

eps_0 is the network before training, c the target's text, eta `negative_guidance`. No picture is read: x_t is where sampling c stands
after a random number of steps. The published code's `--negative_guidance` is eta + 1, since it writes the goal from eps_0(c) on.

`parameters` names what is trained: `x` the cross-attention, `u` all linear and convolutional layers but these, `x-strict` the keys and
values of the text alone, which make a delta that bundles and merges as `ablation`'s does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.common.needs import Need
from concept_ablation.methods.concept_editing import TEMPLATES
from concept_ablation.methods.edited import FIXED, STRENGTH, Edited

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor, nn

    from concept_ablation.diffusion.families.base import Conditioning
    from concept_ablation.methods.ablation.losses import Predict

GROUPS = {"x": "attn", "x-strict": "cross-attn", "u": "full-weight"}
"""What `parameters` can be -> the smallest parameter group that has all of them."""
COUNT = {"type": "integer", "minimum": 1}
POSITIVE = {"type": "number", "exclusiveMinimum": 0}


class Esd(Edited):
    """Its defaults are those of the published diffusers code. It is told of the target alone: nothing is preserved."""

    name = "esd"
    row_fields = ("kind", "targets", "anchor")
    defaults: ClassVar = {
        **FIXED,
        "templates": ["{}"],
        "parameters": "x",
        "steps": 200,
        "learning_rate": 5e-5,
        "batch_size": 1,
        "negative_guidance": 1.0,
        "latents_by": "current",
        "sampling_steps": 50,
        "guidance_scale": 3.0,
        "precision": "auto",
        "seed": 0,
    }
    schema: ClassVar = {
        **STRENGTH,
        "templates": TEMPLATES,
        "parameters": {
            "enum": list(GROUPS),
            "description": "what is trained: cross-attention (x), its keys and values (x-strict), all other layers (u)",
        },
        "steps": {**COUNT, "description": "optimizer steps"},
        "learning_rate": {**POSITIVE, "description": "of Adam"},
        "batch_size": {**COUNT, "description": "latents a step, all at one timestep"},
        "negative_guidance": {**POSITIVE, "description": "eta, above 0: how far away from the target"},
        "latents_by": {
            "enum": ["current", "base"],
            "description": "which network samples the latents: the one in training, or the unchanged one",
        },
        "sampling_steps": {
            **COUNT,
            "description": "steps of a whole sampling, of which a random part is taken",
        },
        "guidance_scale": {"type": "number", "minimum": 1, "description": "of that sampling, 1: none"},
        "precision": {"enum": ["auto", "fp32", "bf16", "fp16"], "description": "of computation"},
        "seed": {"type": "integer", "minimum": 0, "description": "of noise and timesteps"},
    }

    def groups(self, settings: Mapping) -> set[str]:
        return {GROUPS[settings["method"][self.name]["parameters"]]}

    def needs(self, settings: Mapping) -> dict[Need, str]:
        return {"guidance": f"method {self.name}"}

    def edit(self, spec: Mapping, pipeline: DiffusionPipeline) -> tuple[dict[str, Tensor], list[dict]]:
        from concept_ablation.common.progress import progress_bar
        from concept_ablation.methods.strength import put

        settings = self.settings_of(spec)
        targets = [text.replace("{}", word) for text in settings["templates"] for word in spec["targets"]]
        training = EsdTraining(pipeline, targets, settings)
        label = f"{'; '.join(spec['targets'])} away"
        records = list(progress_bar(training, desc=label, total=settings["steps"], unit="step"))
        edited = {name: value.detach().clone() for name, value in training.parameters.items()}
        put(training.parameters, training.start)
        return edited, records


def esd_loss(
    predict: Predict,
    unchanged: Predict,
    noisy: Tensor,
    timesteps: Tensor,
    target: Conditioning,
    empty: Conditioning,
    guidance: float,
) -> Tensor:
    """The mean over all elements of this module's formula: fp32, with gradient through `predict` alone.

    noisy: (n, channels, h, w); timesteps: (n,); target, empty: the conditioning of n prompts each; guidance: eta.
    """
    import torch

    with torch.no_grad():
        plain, towards = (unchanged(noisy, timesteps, prompts).float() for prompts in (empty, target))
        goal = plain - guidance * (towards - plain)
    return (predict(noisy, timesteps, target).float() - goal).square().mean()


class EsdTraining:
    """The training of a pipeline's network away from `targets`, in place: iterating it takes the steps and gives a record of each.

    parameters: what is trained, by name in a delta. start: their values before it.
    """

    def __init__(self, pipeline: DiffusionPipeline, targets: Sequence[str], settings: Mapping) -> None:
        import torch

        from concept_ablation.diffusion.families.base import family_of
        from concept_ablation.methods.ablation.conditioning import Encoder

        self.pipeline, self.settings, self.family = pipeline, settings, family_of(pipeline)
        self.network = self.family.network(pipeline)
        self.targets, encoder = list(targets), Encoder(pipeline)
        count = settings["batch_size"]
        self.texts = {text: encoder.text([text] * count) for text in self.targets}
        with torch.no_grad():
            empty = self.family.unconditional(pipeline)
        self.texts[""] = type(empty).join([empty] * count)
        own = chosen_parameters(self.network, self.family.text_projections(self.network), settings["parameters"])  # fmt: skip
        self.network.requires_grad_(False)
        for value in own.values():
            value.requires_grad_(True)
        self.parameters = {f"{self.family.network_name}.{name}": value for name, value in own.items()}
        self.start = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.generator = torch.Generator("cpu").manual_seed(settings["seed"])
        self.predict, self.unchanged = self._predictors(own)

    def _predictors(self, own: Mapping[str, nn.Parameter]) -> tuple[Predict, Predict]:
        """The prediction of the network in training, and that of the unchanged one."""
        import torch

        from concept_ablation.common.hardware import autocast
        from concept_ablation.methods.ablation.objective import Predictor

        predictor, device = Predictor(self.family, self.network), self.pipeline.device
        before = {f"network.{name}": value.detach().clone() for name, value in own.items()}

        def predict(*inputs: object) -> Tensor:
            with autocast(self.settings["precision"], device):
                return predictor(*inputs)

        def unchanged(*inputs: object) -> Tensor:
            with autocast(self.settings["precision"], device):
                return torch.func.functional_call(predictor, before, inputs)

        return predict, unchanged

    def __iter__(self) -> Iterator[dict]:
        """Take all steps. Raises TrainingError if the loss is no number any more."""
        import torch

        from concept_ablation.common.hardware import peak_memory
        from concept_ablation.methods.ablation.settings import TrainingError

        optimizer = torch.optim.Adam(self.parameters.values(), lr=self.settings["learning_rate"])
        for step in range(1, self.settings["steps"] + 1):
            started = time.perf_counter()
            target, empty = self.texts[self.targets[(step - 1) % len(self.targets)]], self.texts[""]
            noisy, timesteps = self._latents(target, empty)
            inputs = self.predict, self.unchanged, noisy, timesteps, target, empty
            loss = esd_loss(*inputs, self.settings["negative_guidance"])
            if not math.isfinite(value := loss.item()):
                raise TrainingError(f"the loss is {value} at step {step}: lower method.esd.learning_rate, or use fp32")  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory, seconds = peak_memory(self.pipeline.device), time.perf_counter() - started
            yield {"step": step, "loss": value, "seconds": seconds, "peak_memory_bytes": memory}

    def _latents(self, target: Conditioning, empty: Conditioning) -> tuple[Tensor, Tensor]:
        """(n, channels, cells, cells) latents where sampling the target stands after a random number of steps, and (n,) its timestep."""
        import torch

        from concept_ablation.diffusion.sampler import make_scheduler

        settings, device = self.settings, self.pipeline.device
        sampler = make_scheduler(self.pipeline.scheduler, self.family.latent_sampler, self.family.schedulers)
        sampler.set_timesteps(settings["sampling_steps"], device=device)
        stop = int(torch.randint(len(sampler.timesteps), (), generator=self.generator))
        cells = self.network.config.sample_size
        shape = (settings["batch_size"], self.family.latent_channels(self.pipeline), cells, cells)
        latents = torch.randn(shape, generator=self.generator).to(device)
        latents = latents * getattr(sampler, "init_noise_sigma", 1.0)  # flow matching starts from plain noise
        predict = self.predict if settings["latents_by"] == "current" else self.unchanged
        both, scale = type(target).join([empty, target]), settings["guidance_scale"]
        with torch.no_grad():
            for timestep in sampler.timesteps[:stop]:
                times = timestep.expand(2 * len(latents))
                plain, towards = predict(torch.cat([latents, latents]), times, both).float().chunk(2)
                latents = sampler.step(plain + scale * (towards - plain), timestep, latents).prev_sample
        return latents, sampler.timesteps[stop].expand(len(latents))


def chosen_parameters(
    network: nn.Module, projections: Mapping[str, nn.Module], parameters: str
) -> dict[str, nn.Parameter]:
    """The parameters that `parameters` names (x, x-strict, u), by name in the network.

    projections: the layers that make keys and values of the text; the attention layers around them are the cross-attention.
    """
    import torch

    inside = tuple({f"{name.rpartition('.')[0]}." for name in projections})
    found = {}
    for name, module in network.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        crosses = name.startswith(inside)
        if {"x": crosses, "x-strict": name in projections, "u": not crosses}[parameters]:
            found |= {f"{name}.{own}": value for own, value in module.named_parameters()}
    return found


METHOD = Esd()
