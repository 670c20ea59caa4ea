"""Each family beside Stable Diffusion 1, on a tiny pipeline of its class: losses, gradients, deltas, LoRAs, what can't be done.

The predictions are written out here a second time, by diffusers' own pieces. Weights are random, so this shows that all is joined
rightly. It shows no erasure.
"""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from test_training import DATA, PICTURES, PROMPTS, SETTINGS

from concept_ablation.common.hardware import DeviceError
from concept_ablation.diffusion import absent_text
from concept_ablation.diffusion.compvis import LayoutError
from concept_ablation.diffusion.delta import apply_delta, delta_parameters, load_delta, save_delta
from concept_ablation.diffusion.delta_export import export_delta
from concept_ablation.diffusion.delta_import import import_delta
from concept_ablation.diffusion.families.base import ModelError, family_of
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.token_embeddings import target_tokens
from concept_ablation.methods.ablation.training import Training
from concept_ablation.methods.esd import METHOD as ESD
from concept_ablation.methods.esd import EsdTraining, esd_loss
from concept_ablation.methods.uce import METHOD as UCE
from concept_ablation.plan.families import pipeline_class
from concept_ablation.report.card import snippet
from tests.tiny_families import SIDE, make_tiny_flux, make_tiny_sd2, make_tiny_sd3, make_tiny_sdxl

MAKERS = {
    "sd2": make_tiny_sd2,
    "sdxl": make_tiny_sdxl,
    "sd3": make_tiny_sd3,
    "sd3-without-t5": lambda folder: make_tiny_sd3(folder, third=False),
    "flux": make_tiny_flux,
    "flux-schnell": lambda folder: make_tiny_flux(folder, guided=False),
}
SAMPLER = {"scheduler": "default", "steps": 2, "guidance_scale": 3.0, "eta": 0.0, "precision": "fp32"}
SAMPLER |= {"height": SIDE, "width": SIDE}
OWLS = [(prompt.replace("cat", "owl"),) for prompt in PROMPTS]
every_family = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> its tiny pipeline's folder, made when it is first asked for."""

    class Folders(dict):
        def __missing__(self, name):
            self[name] = MAKERS[name](tmp_path_factory.mktemp(name))
            return self[name]

    return Folders()


def pipeline_of(folders, name, short=False):
    """short: T5 reads 24 tokens, which takes a tenth of the time."""
    pipeline = load_pipeline(folders[name], device="cpu")
    if short and name.startswith(("sd3", "flux")):
        pipeline.encode_prompt = functools.partial(pipeline.encode_prompt, max_sequence_length=24)
    return pipeline


def begin(pipeline, data=DATA, **changes):
    bos = "begin-of-text" not in family_of(pipeline).lacks
    settings = dataclasses.replace(SETTINGS, detach_bos=bos, **changes)
    return Training(pipeline, data, OWLS, settings, seed=0, preserved=["a dog", "a red dog", "two dogs"])


# What each family's network predicts, noises and aims at, written out by diffusers' own pieces


def predict(name, pipeline, noisy, timesteps, prompts, cuts):
    """The network's answer; cuts: where each picture was cut, (top, left)."""
    if name == "sd2":
        return pipeline.unet(noisy, timesteps, pipeline.encode_prompt(prompts, "cpu", 1, False)[0]).sample
    if name == "sdxl":
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        sizes = torch.tensor([[SIDE, SIDE, *cut, SIDE, SIDE] for cut in cuts], dtype=torch.float32)
        told = {"text_embeds": pooled, "time_ids": sizes}
        return pipeline.unet(noisy, timesteps, hidden, added_cond_kwargs=told).sample
    if name.startswith("sd3"):
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return pipeline.transformer(noisy, hidden, pooled, timesteps).sample
    hidden, pooled, text_places = pipeline.encode_prompt(prompts)
    count, channels, height, width = noisy.shape
    found = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        timestep=timesteps / 1000,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=text_places,
        guidance=torch.full((count,), 3.5) if name == "flux" else None,
    ).sample
    return pipeline._unpack_latents(found, height * 2, width * 2, pipeline.vae_scale_factor)


def noised(name, pipeline, draws):
    """Noisy latents and the training's target."""
    pixels, config = torch.stack([view.pixels for view in draws.batch.views]), pipeline.vae.config
    posterior = pipeline.vae.encode(pixels).latent_dist
    latents, noise = posterior.mean + posterior.std * draws.posterior_noise, draws.noise
    if name in ("sd2", "sdxl"):
        latents = latents * config.scaling_factor
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        kept = torch.cumprod(1 - betas, 0)[draws.timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        return noisy, kept.sqrt() * noise - (1 - kept).sqrt() * latents if name == "sd2" else noise
    latents = (latents - config.shift_factor) * config.scaling_factor
    level = (draws.timesteps / 1000).view(-1, 1, 1, 1)
    return level * noise + (1 - level) * latents, noise - latents


@every_family
@pytest.mark.parametrize("loss", ["model-based", "noise-based"])
def test_loss_and_gradients_are_those_of_the_formula(name, loss, folders):
    pipeline = pipeline_of(folders, name, short=True)
    training = begin(pipeline, loss=loss, augmentation="compvis", prior_preservation=True)
    draws = training._draws.next_batch()
    found = dict(training._objective.losses(draws))

    target, prior = draws.target, draws.prior
    noisy, goal = (value.detach() for value in noised(name, pipeline, target))
    cuts = [view.cut for view in target.batch.views]
    assert any(cut != (0, 0) for cut in cuts)
    told = (name, pipeline, noisy, target.timesteps)
    if loss == "model-based":
        goal = predict(*told, target.anchor_prompts, cuts).detach()
    error = (predict(*told, target.prompts, cuts) - goal).square() * target.batch.mask
    asked = (error.sum((1, 2, 3)) / target.batch.mask.sum((1, 2, 3))).mean()
    torch.testing.assert_close(found["ablation"], asked, rtol=1e-4, atol=1e-6)

    parameters = list(training.parameters.values())
    pairs = zip(*(torch.autograd.grad(one, parameters) for one in (found["ablation"], asked)), strict=True)
    for ours, theirs in pairs:
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

    noisy, goal = noised(name, pipeline, prior)
    plain = [(0, 0)] * len(prior.prompts)
    own = predict(name, pipeline, noisy, prior.timesteps, prior.prompts, plain)
    torch.testing.assert_close(found["prior"], (own - goal).square().mean(), rtol=1e-4, atol=1e-6)


@every_family
def test_keys_and_values_of_the_text_train_and_nothing_else(name, folders):
    pipeline = pipeline_of(folders, name, short=True)
    network = family_of(pipeline).network(pipeline)
    before = {own: value.clone() for own, value in network.named_parameters()}
    training = begin(pipeline, steps=1, gradient_checkpointing=True)
    list(training)
    changed = {own for own, value in network.named_parameters() if not torch.equal(value, before[own])}
    layers = ("attn2.to_k", "attn2.to_v") if name in ("sd2", "sdxl") else ("add_k_proj", "add_v_proj")
    assert changed == {own for own in before if own.endswith(tuple(f"{layer}.weight" for layer in layers))}
    assert {own.partition(".")[2] for own in training.parameters} == changed
    if name.startswith("flux"):
        assert not any(own.startswith("single") for own in changed)
        single = family_of(pipeline).trainable_parameters(network, "single-attn")
        assert set(single) == {f"single_transformer_blocks.0.attn.to_{part}.weight" for part in "kv"}


@every_family
@torch.no_grad()
def test_the_targets_prediction_moves_to_the_anchors_and_a_preserved_prompts_stays(name, folders):
    """The network is made to listen to its text, as a trained one does, and not to the pooled encoding, which stays as it is."""
    pipeline = pipeline_of(folders, name, short=True)
    family = family_of(pipeline)
    network = family.network(pipeline)
    for layer in family.text_projections(network).values():
        layer.weight.mul_(6)
    for own, value in network.named_parameters():
        if "add_embedding.linear_2" in own or "text_embedder.linear_2" in own:
            value.zero_()
        elif "to_add_out" in own or "attn2.to_out" in own:
            value.mul_(3)
    more = {"teacher": "frozen", "preserve": "distill", "preserve_weight": 3.0}
    side = SIDE if name == "sd2" else SIDE // 2  # few cells
    pictures = AnchorData([picture.resize((side, side)) for picture in PICTURES], PROMPTS)
    training = begin(pipeline, data=pictures, steps=30, learning_rate=3e-3, **more)
    shape = training._draws.next_batch().target.noise.shape[1:]
    noisy = torch.randn((4, *shape), generator=torch.Generator().manual_seed(1))
    timesteps, encoder = torch.tensor([50, 350, 650, 950]), Encoder(pipeline)

    def predicted(prompt):
        return family.predict(network, noisy, timesteps, encoder.text([prompt] * 4))

    target, anchor, preserved = (predicted(f"a red {word}") for word in ("owl", "cat", "dog"))
    with torch.enable_grad():
        list(training)
    moved = predicted("a red owl") - target
    assert (moved + target - anchor).square().mean() < 0.7 * (target - anchor).square().mean()
    assert torch.cosine_similarity(moved.flatten(), (anchor - target).flatten(), dim=0) > 0.7
    assert (predicted("a red dog") - preserved).square().mean() < 0.5 * moved.square().mean()


@every_family
def test_a_delta_makes_another_pipeline_draw_the_same(name, folders, tmp_path):
    pipeline = pipeline_of(folders, name)

    def draw(pipeline):
        return next(sample_images(pipeline, ["an owl"], [3], sampler=SAMPLER, batch_size=1))

    plain = draw(pipeline)
    training = begin(pipeline, steps=2, learning_rate=3e-2)
    list(training)
    save_delta(tmp_path / "d.safetensors", training.parameters, {})
    other = pipeline_of(folders, name)
    assert draw(other).tobytes() == plain.tobytes()
    apply_delta(other, tmp_path / "d.safetensors")
    found = delta_parameters(other, training.parameters)
    assert all(torch.equal(found[own], value) for own, value in training.parameters.items())
    assert draw(other).tobytes() == draw(pipeline).tobytes() != plain.tobytes()


@pytest.fixture
def delta(request, folders, tmp_path):
    """A trained delta of the family called so, and its base."""
    pipeline = pipeline_of(folders, request.param)
    training = begin(pipeline, steps=2, learning_rate=1e-2)
    list(training)
    path, base = tmp_path / "delta.safetensors", str(folders[request.param])
    save_delta(path, training.parameters, {"base_model": base, "group": "cross-attn"})
    return request.param, path, pipeline


def change_of(pipeline, prompt="an owl"):
    family = family_of(pipeline)
    shape = (1, family.latent_channels(pipeline), SIDE // 4, SIDE // 4)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    conditioning = family.encode_prompts(pipeline, [prompt])
    return family.predict(family.network(pipeline), noisy, torch.tensor([500]), conditioning).detach()


@pytest.mark.parametrize("delta", list(MAKERS), indirect=True)
def test_a_lora_is_loaded_by_the_familys_own_pipeline(delta, folders, tmp_path):
    name, path, trained = delta
    export_delta(path, tmp_path / "lora.safetensors", "lora", error=1e-4)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    other = type(trained).from_pretrained(folders[name], **absent)
    before = change_of(other)
    other.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(change_of(other), change_of(trained), rtol=1e-2, atol=1e-4)
    assert not torch.allclose(before, change_of(trained), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("delta", list(MAKERS), indirect=True)
def test_kohyas_form_is_for_unets_and_says_so(delta, folders, tmp_path):
    name, path, trained = delta
    out = tmp_path / "kohya.safetensors"
    if name not in ("sd2", "sdxl"):
        with pytest.raises(LayoutError, match="no names of single layers in kohya's"):
            export_delta(path, out, "kohya")
        return
    export_delta(path, out, "kohya", error=1e-4)
    if name == "sdxl":
        assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_up.weight" in load_file(out)
    other = type(trained).from_pretrained(folders[name])
    other.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    torch.testing.assert_close(change_of(other), change_of(trained), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("delta", ["sdxl", "sd3", "flux"], indirect=True)
def test_a_cards_snippet_loads_the_model_without_this_package(delta, folders, monkeypatch, tmp_path):
    name, path, trained = delta
    tensors, metadata = load_delta(path)
    code = snippet(tensors, metadata, None)
    assert type(trained).__name__ in code and "concept_ablation" not in code.replace(str(folders[name]), "")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace(repr(folders[name].name), repr(str(folders[name]))), scope)  # noqa: S102 - the code is ours
    torch.testing.assert_close(change_of(scope["pipeline"]), change_of(trained))


# Points of single families


def test_sd3s_noise_levels_are_logit_normal_and_shifted(folders):
    schedule = family_of(pipeline := pipeline_of(folders, "sd3")).noise_schedule(pipeline)
    drawn = schedule.draw_timesteps(200_000, torch.Generator().manual_seed(0)) / 1000
    even = drawn / (3 - 2 * drawn)  # the inverse of shift x u / (1 + (shift - 1) x u) for shift 3
    logit = torch.log(even / (1 - even))
    assert float(logit.mean()) == pytest.approx(0, abs=0.01) and float(logit.std()) == pytest.approx(
        1, abs=0.01
    )
    pipeline.scheduler.set_timesteps(1000)
    levels = pipeline.scheduler.sigmas[:-1]
    assert float(drawn.max()) <= float(levels.max()) and float(drawn.min()) > 0
    flux = pipeline_of(folders, "flux")
    own = (
        family_of(flux).noise_schedule(flux).draw_timesteps(200_000, torch.Generator().manual_seed(0)) / 1000
    )
    assert float(own.median()) == pytest.approx(0.5, abs=0.01)


def test_a_folder_without_the_third_text_encoder_is_loaded_without_it(folders):
    pipeline = pipeline_of(folders, "sd3-without-t5")
    assert pipeline.text_encoder_3 is None
    assert list(family_of(pipeline).encoders(pipeline)) == ["text_encoder", "text_encoder_2"]
    hidden = family_of(pipeline).encode_prompts(pipeline, ["a cat"]).hidden
    assert hidden.shape[1] == 77 + 256 and not hidden[:, 77:].any()


@pytest.mark.parametrize("most", [0, 512], ids=["many-tokens", "few-tokens"])
def test_the_absent_encoders_tokens_are_computed_as_one_and_change_nothing(folders, monkeypatch, most):
    """Predictions and gradients are those of diffusers' own network, which computes all 256; in a copy of the network, too."""
    monkeypatch.setattr(absent_text, "PLAIN_ATTENTION_TOKENS", most)
    pipeline = pipeline_of(folders, "sd3-without-t5")
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    theirs = type(pipeline).from_pretrained(folders["sd3-without-t5"], **absent).transformer
    family, seen, results = family_of(pipeline), [], []
    with torch.no_grad():
        conditioning = family.encode_prompts(pipeline, ["a cat", "an owl on a pink background"])
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for network in (theirs, pipeline.transformer, copy.deepcopy(pipeline.transformer)):
        network.transformer_blocks[0].register_forward_hook(
            lambda block, inputs, named, output: seen.append(output[0].shape[1]), with_kwargs=True
        )
        prediction = family.predict(network, noisy, torch.tensor([100, 800]), conditioning)
        prediction.square().sum().backward()
        trained = family.trainable_parameters(network, "cross-attn").values()
        results.append([prediction, *(value.grad for value in trained)])
    assert seen == [77 + 256, 78, 78] and all(values.abs().max() > 1e-4 for values in results[0])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-3, atol=1e-5)


def test_a_folder_of_sd3_whose_third_text_encoder_was_not_downloaded_is_loaded_without_it(folders, tmp_path):
    import shutil

    folder = tmp_path / "partly"
    shutil.copytree(folders["sd3"], folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"][1] == "T5EncoderModel"
    assert load_pipeline(folder, device="cpu").text_encoder_3 is None


def test_sdxls_vae_computes_in_fp32_whatever_the_precision(folders):
    pipeline = pipeline_of(folders, "sdxl")
    family, pixels = family_of(pipeline), torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    plain = family.encode_pixels(pipeline, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family.encode_pixels(pipeline, pixels), plain)
        assert pipeline.vae.encode(pixels).latent_dist.parameters.dtype == torch.bfloat16


def test_sdxl_is_told_where_a_picture_was_cut(folders):
    pipeline = pipeline_of(folders, "sdxl")
    batch = begin(pipeline, augmentation="compvis")._draws.next_batch().target.batch
    told = Encoder(pipeline).framed(Encoder(pipeline).text(["an owl"] * 4), batch).time_ids
    for ids, view in zip(told.tolist(), batch.views, strict=True):
        assert ids == [SIDE, SIDE, *view.cut, SIDE, SIDE]
        near = view.prefix in ("zoomed in ", "close up ")
        assert near or view.cut == (0, 0)
    assert any(view.cut != (0, 0) for view in batch.views)


def test_sdxls_guidance_leads_away_from_nothing_as_in_its_pipeline(folders):
    pipeline = pipeline_of(folders, "sdxl")
    empty = family_of(pipeline).unconditional(pipeline)
    _, negative, _, pooled = pipeline.encode_prompt(["a cat"], do_classifier_free_guidance=True)
    assert torch.equal(empty.hidden, negative) and torch.equal(empty.pooled, pooled)
    assert len(empty) == 1 and empty.time_ids.tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]]


def test_flux_takes_no_negative_prompt(folders):
    with pytest.raises(ModelError, match="FLUX.1 takes no negative prompt"):
        list(sample_images(pipeline_of(folders, "flux"), ["a"], [0], sampler=SAMPLER, batch_size=1, negative_prompt="b"))  # fmt: skip


def test_guidance_is_an_input_of_flux(folders):
    pipeline = pipeline_of(folders, "flux")
    pictures = [
        next(
            sample_images(
                pipeline, ["a cat"], [0], sampler={**SAMPLER, "guidance_scale": scale}, batch_size=1
            )
        )
        for scale in (1.0, 9.0)
    ]
    assert pictures[0].tobytes() != pictures[1].tobytes()


@every_family
def test_a_folders_class_is_read_without_loading_it(name, folders):
    found = pipeline_class({"path": str(folders[name]), "revision": None})
    assert found == type(pipeline_of(folders, name)).__name__


# What single methods ask of a family


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_esd_leads_away_from_what_guidance_sets_against_the_target(name, folders):
    pipeline = pipeline_of(folders, name, short=True)
    settings = {
        **ESD.defaults,
        "steps": 1,
        "sampling_steps": 3,
        "precision": "fp32",
        "parameters": "x-strict",
    }
    training = EsdTraining(pipeline, ["owl"], settings)
    noisy, timesteps = training._latents(training.texts["owl"], training.texts[""])
    assert torch.isfinite(noisy).all() and noisy.shape[1] == family_of(pipeline).latent_channels(pipeline)
    told = training.texts["owl"], training.texts[""]
    loss = esd_loss(training.predict, training.unchanged, noisy, timesteps, *told, 1.0)
    with torch.no_grad():
        towards, plain = (training.unchanged(noisy, timesteps, text) for text in told)
    assert float(loss.detach()) == pytest.approx(float((2 * (towards - plain)).square().mean()), rel=1e-3)
    (record,) = training
    assert record["loss"] > 0 and all(
        not torch.equal(value, training.start[own]) for own, value in training.parameters.items()
    )


def test_uce_takes_the_joined_encoding_of_sdxls_two_text_encoders(folders):
    pipeline = pipeline_of(folders, "sdxl")
    spec = {
        "targets": ["owl"],
        "anchor": "cat",
        "neighbors": [],
        "settings": {"tokens": "rest", "ridge": 1e-3},
    }
    edited, _ = UCE.edit(spec, pipeline)
    encoder = Encoder(pipeline)
    owl, cat = (encoder.text([word]).hidden[0] for word in ("owl", "cat"))
    for name, value in edited.items():
        old = pipeline.unet.get_parameter(name.removeprefix("unet."))
        gap, left = ((owl @ weight.T - cat @ old.T)[3:].norm() for weight in (old, value))
        assert left < 0.2 * gap


@every_family
def test_token_rows_of_every_text_encoder_train(name, folders, tmp_path):
    pipeline = pipeline_of(folders, name, short=True)
    family = family_of(pipeline)
    tokens = {
        own: target_tokens(tokenizer, ["owl"], "cat")
        for own, tokenizer in family.tokenizers(pipeline).items()
    }
    settings = dataclasses.replace(SETTINGS, detach_bos=False, group="embedding", steps=1)
    training = Training(pipeline, DATA, OWLS, settings, seed=0, tokens=tokens)
    before = {own: value.clone() for own, value in training.parameters.items()}
    list(training)
    changed = {
        own.partition(".")[0] for own, value in training.parameters.items() if not value.equal(before[own])
    }
    assert changed == set(family.encoders(pipeline))
    save_delta(tmp_path / "d.safetensors", training.parameters, {})
    other = pipeline_of(folders, name)
    apply_delta(other, tmp_path / "d.safetensors")
    found = delta_parameters(other, training.parameters)
    assert all(torch.equal(found[own], value) for own, value in training.parameters.items())


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_what_other_programs_have_no_names_for_is_refused(name, folders, tmp_path):
    pipeline = pipeline_of(folders, name)
    encoder = list(family_of(pipeline).encoders(pipeline))[-1]
    width = family_of(pipeline).token_tables(pipeline)[encoder].embedding_dim
    path = tmp_path / "rows.safetensors"
    save_delta(path, {f"{encoder}.token_embedding.5": torch.ones(width)}, {"base_model": str(folders[name])})
    with pytest.raises(LayoutError, match="CompVis's layout"):
        export_delta(path, tmp_path / "out.pt", "compvis")
    export_delta(path, tmp_path / "out.bin", "delta-bin")
    state = torch.load(tmp_path / "out.bin", weights_only=True)[encoder]
    assert state.keys() == getattr(pipeline, encoder).state_dict().keys()


def test_weights_in_half_precision_train_in_fp32_and_refuse_to_compute_in_it(folders):
    pipeline = pipeline_of(folders, "flux", short=True)
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(DeviceError, match="held in half precision on 'cpu'.*allowed: bf16"):
        begin(pipeline)
    with pytest.raises(DeviceError, match="held in half precision"):
        next(sample_images(pipeline, ["a"], [0], sampler=SAMPLER, batch_size=1))
    training = begin(pipeline, steps=1, precision="bf16")
    (record,) = training
    assert record.loss > 0
    held = {own: value.dtype for own, value in pipeline.transformer.named_parameters()}
    assert {own for own, kind in held.items() if kind == torch.float32} == {
        own.partition(".")[2] for own in training.parameters
    }
    sampler = {**SAMPLER, "precision": "bf16"}
    assert next(sample_images(pipeline, ["a"], [0], sampler=sampler, batch_size=1)).size == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_on_a_gpu_what_is_published_in_half_precision_is_held_so(name, folders):
    family = family_of(pipeline_of(folders, name))
    held = family.precisions(torch.device("cuda"))
    halved = {"sd3": {"text_encoder_3"}, "flux": {"transformer", "text_encoder_2"}}[name]
    assert {own for own, kind in held.items() if kind == torch.bfloat16} == halved
    assert set(family.precisions(torch.device("cpu")).values()) == {torch.float32}


def test_a_compvis_delta_of_sd2_is_of_the_network_alone(folders, tmp_path):
    pipeline = pipeline_of(folders, "sd2")
    training = begin(pipeline, steps=1)
    list(training)
    save_delta(tmp_path / "d.safetensors", training.parameters, {"base_model": str(folders["sd2"])})
    export_delta(tmp_path / "d.safetensors", tmp_path / "compvis.pt", "compvis")
    tensors, metadata = import_delta(tmp_path / "compvis.pt", folders["sd2"])
    assert metadata["group"] == "cross-attn"
    assert all(torch.equal(tensors[own], value) for own, value in training.parameters.items())
    with pytest.raises(LayoutError, match="an OpenCLIP text encoder"):
        family_of(pipeline).compvis_names(pipeline, ["text_encoder.final_layer_norm.weight"])
