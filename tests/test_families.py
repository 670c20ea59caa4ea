"""Families of models: how one is chosen, and that nothing outside a family's file assumes Stable Diffusion's build.

The toy family here differs in all that the coming ones differ in: another network's name, two text encoders of which a
model may lack one, a pooled vector and numbers beside the hidden states, latents with a shift, flow matching.
"""

import json
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_training import DATA, SETTINGS, TARGETS
from tiny import make_tiny_pipeline
from torch import nn

from concept_ablation.diffusion.delta import apply_delta, delta_parameters, save_delta
from concept_ablation.diffusion.delta_import import detect_group
from concept_ablation.diffusion.families.base import (
    Conditioning,
    Family,
    ModelError,
    NoiseSchedule,
    family_named,
    family_of,
)
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.lora import factorise
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.training import Training
from concept_ablation.registries import FAMILIES


def test_a_family_is_chosen_by_the_pipelines_class_or_one_that_it_inherits_from():
    assert family_named("StableDiffusionPipeline") is FAMILY

    class StableDiffusionPipeline: ...

    class Mine(StableDiffusionPipeline): ...

    assert family_of(StableDiffusionPipeline()) is family_of(Mine()) is FAMILY
    with pytest.raises(
        ModelError, match="'OtherPipeline' is not supported .allowed: StableDiffusionPipeline, "
    ):
        family_named("OtherPipeline")
    with pytest.raises(ModelError, match="'object' is not supported"):
        family_of(object())


@pytest.mark.parametrize("name", ["StableCascadeCombinedPipeline", None, 3, ["module", "Own"], {}])
def test_a_folder_of_another_class_is_refused_in_a_line(name, tmp_path):
    folder = make_tiny_pipeline(tmp_path, size=32)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(ModelError, match="is not supported .allowed: StableDiffusionPipeline") as caught:
        load_pipeline(folder, device="cpu", trust_remote_code=True)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_conditionings_are_cut_and_joined():
    whole = Conditioning(torch.randn(3, 5, 4), torch.randn(3, 2))
    parts = [whole[i : i + 1] for i in range(3)]
    again = Conditioning.join([parts[2], parts[0]])
    assert len(whole) == 3 and len(again) == 2 and again.time_ids is None
    assert torch.equal(again.hidden, whole.hidden[[2, 0]]) and torch.equal(again.pooled, whole.pooled[[2, 0]])


# A family of another build


class FlowSchedule(NoiseSchedule):
    """Timesteps are noise levels between 0 and 1; the network predicts from latents to noise."""

    def draw_timesteps(self, count, generator):
        return torch.sigmoid(torch.randn(count, generator=generator))

    def add_noise(self, latents, noise, timesteps):
        level = timesteps.view(-1, 1, 1, 1)
        return (1 - level) * latents + level * noise

    def target(self, latents, noise, timesteps):
        return noise - latents


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_k_proj, self.add_v_proj = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)
        self.style = nn.Linear(2, 3)

    def forward(self, noisy, level, hidden, pooled, sizes):
        text = (self.add_k_proj(hidden).softmax(1) * self.add_v_proj(hidden)).sum(1)
        told = text + self.style(pooled) + sizes.mean(1, keepdim=True)
        return noisy * level.view(-1, 1, 1, 1) + told[:, :, None, None]

    def disable_gradient_checkpointing(self): ...


class TextEncoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(9, width), nn.Linear(width, width)

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, ids):
        return self.mix(self.tokens(ids))


class ToyPipeline(nn.Module):
    """The parts that training and deltas ask of a pipeline."""

    vae_scale_factor, device = 8, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = (
            Transformer(),
            TextEncoder(4),
            TextEncoder(2),
        )
        self.text_encoder_3 = None
        self.vae = SimpleNamespace(
            config=SimpleNamespace(latent_channels=3, shift_factor=0.1, scaling_factor=2)
        )


class Toy(Family):
    title = "Toy"
    network_name = "transformer"
    text_encoders: ClassVar = {
        name: name.replace("text_encoder", "tokenizer")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    }
    groups: ClassVar = {"cross-attn": re.compile(r"add_[kv]_proj\."), "full-weight": re.compile("")}

    def encode_prompts(self, pipeline, prompts):
        ids = torch.tensor(
            [[len(word) % 9 for word in (prompt + " a b c").split()[:3]] for prompt in prompts]
        )
        one, two = (encoder(ids) for encoder in self.encoders(pipeline).values())
        return Conditioning(torch.cat((one, two), 2), two.mean(1), torch.full((len(prompts), 2), 0.5))

    def encode_pixels(self, pipeline, pixels):
        mean = nn.functional.avg_pool2d(pixels, 8)
        return torch.cat((mean, torch.zeros_like(mean)), 1)

    def latents(self, pipeline, moments, noise):
        mean, config = moments[:, :3], pipeline.vae.config
        return (mean + noise - config.shift_factor) * config.scaling_factor

    def predict(self, network, noisy, timesteps, conditioning):
        return network(noisy, timesteps, conditioning.hidden, conditioning.pooled, conditioning.time_ids)

    def noise_schedule(self, pipeline):
        return FlowSchedule()

    def text_projections(self, network):
        return {name: getattr(network, name) for name in ("add_k_proj", "add_v_proj")}


TOY = Toy()


@pytest.fixture
def toy(monkeypatch):
    """A pipeline of the toy family, which is registered meanwhile."""
    monkeypatch.setitem(FAMILIES.targets, "ToyPipeline", f"{__name__}:TOY")
    torch.manual_seed(0)
    yield ToyPipeline()
    FAMILIES._loaded.pop("ToyPipeline", None)


def train(pipeline, tokens=None, **changes):
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "steps": 2, **changes})
    training = Training(pipeline, DATA, TARGETS, settings, seed=0, tokens=tokens)
    return training, list(training)


@pytest.mark.parametrize("teacher", ["current", "frozen"])
@pytest.mark.parametrize("loss", ["model-based", "noise-based"])
def test_another_familys_network_is_trained_by_its_own_names(toy, loss, teacher):
    before = {name: value.clone() for name, value in toy.named_parameters()}
    training, records = train(
        toy, loss=loss, teacher=teacher, prior_preservation=True, augmentation="compvis"
    )
    assert set(training.parameters) == {f"transformer.add_{part}_proj.weight" for part in "kv"}
    changed = {name for name, value in toy.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(training.parameters) and all(record.loss > 0 for record in records)


def test_the_prior_aims_at_the_familys_own_target(toy):
    training, _ = train(toy, steps=0, prior_preservation=True)
    draws = training._draws.next_batch()
    _, loss = (loss for _, loss in training._objective.losses(draws))
    prior = draws.prior
    pixels = torch.stack([view.pixels for view in prior.batch.views])
    latents = (nn.functional.avg_pool2d(pixels, 8) + prior.posterior_noise - 0.1) * 2
    level = prior.timesteps.view(-1, 1, 1, 1)
    told = TOY.encode_prompts(toy, prior.prompts)
    predicted = TOY.predict(toy.transformer, (1 - level) * latents + level * prior.noise, level, told)
    assert float(loss.detach()) == pytest.approx(
        float((predicted - (prior.noise - latents)).square().mean().detach()), rel=1e-5
    )


def test_token_rows_of_two_text_encoders_train_and_come_back_by_a_delta(toy, tmp_path):
    tokens = {"text_encoder": [3], "text_encoder_2": [3, 5]}
    training, _ = train(toy, tokens, group="embedding")
    names = [
        "text_encoder.token_embedding.3",
        *(f"text_encoder_2.token_embedding.{token}" for token in (3, 5)),
    ]
    assert list(training.parameters) == names and detect_group(names, toy) == "embedding"
    save_delta(tmp_path / "d.safetensors", training.parameters, {})
    torch.manual_seed(0)
    other = ToyPipeline()
    apply_delta(other, tmp_path / "d.safetensors")
    found, expected = delta_parameters(other, names), training.parameters
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert torch.equal(toy.text_encoder_2.tokens.weight, other.text_encoder_2.tokens.weight)


def test_a_lora_is_of_the_familys_network(toy):
    changes = {f"transformer.add_{part}_proj.weight": torch.randn(3, 6) for part in "kv"}
    lora = factorise(changes, TOY.network_name, rank=2)
    assert lora.network == "transformer" and set(lora.layers) == {"add_k_proj", "add_v_proj"}
    assert detect_group(changes, toy) == "cross-attn"
