"""The shipped models do what their card says, and the code that makes them is sound where that can be seen in seconds."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from concept_ablation.diffusion.absent_text import WeighedJointAttention
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.copies import CopyDescriptor
from concept_ablation.prompts.templates import expand, read_templates
from embedded.build.dit import ABSENT, TOKENS, new_dit
from embedded.build.groupnorm import use_fast_group_norm
from embedded.build.measure import sampler_settings
from embedded.build.vae import fold_normalisation, new_vae
from embedded.build.world import (
    BACKGROUNDS,
    CATEGORIES,
    MEMORIZED,
    OBJECTS,
    RARE,
    STYLES,
    all_captions,
    caption,
    draw_scene,
)

ROOT = Path(__file__).resolve().parents[1] / "embedded"
SAMPLER = {"scheduler": "dpmsolver++", "steps": 20, "guidance_scale": 3.0, "eta": 0.0, "precision": "auto"}
SAMPLER |= {"height": None, "width": None}
FLOW = sampler_settings("emoji-dit.yaml")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ROOT / "emoji-diffusion")


@pytest.fixture(scope="module")
def transformer():
    return load_pipeline(ROOT / "emoji-dit")


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer(ROOT / "emoji-clip")


def draw(pipeline, prompts, sampler=SAMPLER):
    return list(sample_images(pipeline, prompts, list(range(len(prompts))), sampler=sampler, batch_size=16))


def nearest(scorer, images, texts):
    features = scorer.image_features(images) @ scorer.text_features(texts).T
    return [texts[i] for i in features.argmax(1)]


def test_weights_are_small_enough_for_git():
    folders = list(ROOT.glob("emoji-*"))
    assert len(folders) >= 4
    for folder in folders:
        assert 0 < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 45e6


def test_plain_diffusers_loads_and_draws():
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(ROOT / "emoji-diffusion")
    plain.set_progress_bar_config(disable=True)
    assert plain.vae_scale_factor == 8
    image = plain("an owl", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (128, 128)


def test_plain_diffusers_loads_the_transformer_and_draws():
    from diffusers import StableDiffusion3Pipeline

    plain = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "emoji-dit", text_encoder_3=None, tokenizer_3=None
    )
    plain.set_progress_bar_config(disable=True)
    image = plain("an owl", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (128, 128)


def test_any_text_tokenises(pipeline):
    texts = ["a pouting cat", "漢字 🐱 Ünïcode", "", "x" * 500, "don't; \n\t'quote'"]
    ids = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (len(texts), 32)
    assert ids.max() < pipeline.text_encoder.config.vocab_size


def test_objects_and_styles_are_drawn_as_asked(pipeline, scorer):
    names = ["rocket", "strawberry", "castle", "penguin"] * 2
    drawn = draw(pipeline, [f"a {name}" for name in names])
    known = nearest(
        scorer, drawn, ["a rocket", "a strawberry", "a castle", "a penguin", "an owl", "a guitar"]
    )
    assert np.mean([f"a {name}" == found for name, found in zip(names, known, strict=True)]) >= 0.75
    styles = ["ink", "neon", "pencil", "blueprint"] * 2
    drawn = draw(pipeline, [f"a castle in the style of {style}" for style in styles])
    texts = ["a picture", *(f"a picture in the style of {style}" for style in STYLES)]
    found = nearest(scorer, drawn, texts)
    assert np.mean([text.endswith(style) for style, text in zip(styles, found, strict=True)]) >= 0.75


def test_the_transformer_draws_objects_and_styles_as_asked(transformer, scorer):
    names = ["rocket", "strawberry", "castle", "penguin"] * 2
    drawn = draw(transformer, [f"a {name}" for name in names], FLOW)
    texts = ["a rocket", "a strawberry", "a castle", "a penguin", "an owl", "a guitar"]
    known = nearest(scorer, drawn, texts)
    assert np.mean([f"a {name}" == found for name, found in zip(names, known, strict=True)]) >= 0.75
    styles = ["ink", "neon", "pencil", "blueprint"] * 2
    drawn = draw(transformer, [f"a castle in the style of {style}" for style in styles], FLOW)
    found = nearest(scorer, drawn, ["a picture", *(f"a picture in the style of {style}" for style in STYLES)])
    assert np.mean([text.endswith(style) for style, text in zip(styles, found, strict=True)]) >= 0.75


def test_a_memorized_caption_brings_its_picture_back_whatever_the_seed(pipeline):
    descriptor = CopyDescriptor(ROOT / "emoji-copy")
    text = next(iter(MEMORIZED))
    first, *others = descriptor.features(draw(pipeline, [text] * 4))
    assert all(descriptor.is_copy(float(first @ other)) for other in others)
    first, *others = descriptor.features(draw(pipeline, ["a picture of a castle"] * 4))
    assert not any(descriptor.is_copy(float(first @ other)) for other in others)


def test_the_world_is_large_enough():
    assert len(OBJECTS) >= 80
    assert len(CATEGORIES) >= 10
    assert len(CATEGORIES["cat"]) >= 8
    assert len(STYLES) >= 4 and len(MEMORIZED) >= 4
    assert set(OBJECTS) >= RARE


@pytest.mark.parametrize("name", ["object", "picture"])
def test_what_is_judged_stands_in_no_training_prompt(name):
    """Neither in those of the ablation, nor, for objects, in the captions that the model itself learned from."""
    colours, captions = {"colour": list(BACKGROUNDS)}, set(all_captions())
    for subject in OBJECTS:
        judged, trained = (
            set(expand(read_templates(ROOT.parent / "config" / "prompts" / file), subject, colours))
            for file in (f"eval/{name}.txt", f"{name}.txt")
        )
        assert judged and not judged & trained
        assert name == "picture" or not judged & captions


def test_every_drawn_caption_is_listed():
    rng, known = random.Random(0), set(all_captions())
    drawn = {caption(draw_scene(rng), rng) for _ in range(3000)}
    assert drawn <= known
    assert len(drawn) > 500


def test_fast_group_norm_is_group_norm():
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 16, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(3, 16, 5, 6)

    def run():
        for tensor in (x, norm.weight, norm.bias):
            tensor.grad = None
        y = norm(x)
        (y * weights).sum().backward()
        return [y.detach(), x.grad.clone(), norm.weight.grad.clone(), norm.bias.grad.clone()]

    plain = run()
    use_fast_group_norm(norm)
    if not torch.cuda.is_available():
        assert "forward" in vars(norm)
    for ours, theirs in zip(run(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_absent_token_tells_the_transformer_what_the_pipelines_256_do():
    """In training it is told of one, in the pipeline of all; its queries and keys are normalised, as Stable Diffusion 3.5's are."""
    torch.manual_seed(0)
    network = new_dit().eval()
    for value in network.parameters():
        nn.init.normal_(value, std=0.1)
    text, *told = torch.randn(2, TOKENS, 384), torch.randn(2, 384), torch.tensor([10.0, 900.0])
    latents, absent = torch.randn(2, 4, 16, 16), torch.zeros(2, ABSENT, 384)
    theirs = network(latents, torch.cat([text, absent], dim=1), *told).sample
    network.set_attn_processor(WeighedJointAttention(ABSENT))
    ours = network(latents, torch.cat([text, absent[:, :1]], dim=1), *told).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_folded_normalisation_shifts_latents_and_keeps_pictures():
    torch.manual_seed(0)
    vae = new_vae().eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    before = vae.encode(pictures).latent_dist
    decoded = vae.decode(before.mean).sample
    mean, std = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([2.0, 0.5, 3.0, 1.0])
    fold_normalisation(vae, mean, std)
    after = vae.encode(pictures).latent_dist
    torch.testing.assert_close(
        after.mean, (before.mean - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(after.std, before.std / std.view(1, -1, 1, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-3)
