import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_tiny_pipeline

from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import (
    FAR_PREFIXES,
    NEAR_PREFIXES,
    AnchorData,
    Batch,
    DataError,
    augment,
)

SIZE, FACTOR = 64, 8


def picture(seed=0, size=(SIZE, SIZE)):
    """No pixel is the canvas's grey (0 after normalisation lies between 127 and 128, so none can be)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def views(form, count=600, image=None, factor=FACTOR, mask_border=False):
    rng = random.Random(0)
    return [augment(image or picture(), form, factor, rng, mask_border) for _ in range(count)]


def kind(view):
    if view.prefix in FAR_PREFIXES:
        return "far"
    return "near" if view.prefix in NEAR_PREFIXES else "plain"


def test_no_augmentation_is_the_image_itself():
    view = views("none", 1)[0]
    expected = np.asarray(picture(), np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(view.pixels, expected) and view.pixels.min() >= -1 and view.pixels.max() <= 1
    assert view.mask.shape == (1, SIZE // FACTOR, SIZE // FACTOR) and view.mask.min() == 1
    assert view.prefix == "" and view.whole


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_shares_and_prefixes(form):
    drawn = views(form)
    count = Counter(kind(view) for view in drawn)
    # Shrinking draws 21 .. 64 evenly in 2/3 of the cases: 18 of 44 sides are below 0.6 x 64.
    assert count["near"] / len(drawn) == pytest.approx(1 / 3, abs=0.06)
    assert count["far"] / len(drawn) == pytest.approx(2 / 3 * 18 / 44, abs=0.06)
    assert {view.prefix for view in drawn} == {*FAR_PREFIXES, *NEAR_PREFIXES, ""}
    for view in drawn:
        assert view.pixels.shape == (3, SIZE, SIZE) and view.mask.shape == (1, SIZE // FACTOR, SIZE // FACTOR)


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_mask_lets_no_canvas_through(form):
    far = [view for view in views(form) if kind(view) == "far"]
    for view in far:
        assert 0 < view.mask.sum() < view.mask.numel()
        canvas = (view.pixels == 0).all(0)
        assert canvas.any()
        seen = view.mask[0].repeat_interleave(FACTOR, 0).repeat_interleave(FACTOR, 1).bool()
        if view.mask.sum() > 1:  # the smallest may have no cell that lies wholly inside
            assert not (canvas & seen).any()
    assert any(view.mask.sum() > 1 for view in far)


def test_mask_is_one_cell_smaller_than_the_image_on_each_side():
    for view in views("diffusers", image=picture(size=(128, 128)), mask_border=True):
        if kind(view) == "near":
            assert view.mask.min() == 1
            continue
        inside = torch.nonzero((view.pixels != 0).any(0))
        (top, left), (bottom, right) = inside.min(0).values.tolist(), (inside.max(0).values + 1).tolist()
        expected = torch.zeros(16, 16)
        expected[top // 8 + 1 : bottom // 8 - 1, left // 8 + 1 : right // 8 - 1] = 1
        assert torch.equal(view.mask[0], expected)


def test_the_forms_differ_between_six_tenths_and_one():
    plain = [view for view in views("compvis") if kind(view) == "plain"]
    assert plain and all(view.whole and view.mask.min() == 1 for view in plain)
    plain = [view for view in views("diffusers") if kind(view) == "plain" and not view.whole]
    assert len(plain) > 50 and all(view.mask.min() == 0 for view in plain)


@pytest.mark.parametrize("form", ["none", "compvis", "diffusers"])
def test_mask_border_masks_the_border_cells_of_whole_images_alone(form):
    expected = torch.zeros(1, 8, 8)
    expected[:, 1:7, 1:7] = 1
    free, bordered = views(form), views(form, mask_border=True)
    assert sum(view.whole for view in free) > 0
    for plain, view in zip(free, bordered, strict=True):
        assert torch.equal(plain.pixels, view.pixels) and plain.prefix == view.prefix
        assert torch.equal(view.mask, expected if view.whole else plain.mask)
        assert plain.mask.min() == 1 or not plain.whole


def test_masks_are_never_empty_even_in_a_latent_of_four_cells():
    for form in ("compvis", "diffusers"):
        assert all(view.mask.sum() > 0 for view in views(form, image=picture(size=(32, 32))))


def test_every_image_comes_once_before_any_comes_again():
    data = AnchorData([picture(i) for i in range(5)], ["a", "b", "c", "d", "e"])
    batches = data.batches(2, "none", 0.5, FACTOR, random.Random(1))
    positions = [position for _ in range(5) for position in next(batches).positions]
    assert sorted(positions[:5]) == sorted(positions[5:]) == [0, 1, 2, 3, 4]


def test_batches_go_on_where_others_were():
    data = AnchorData([picture(i) for i in range(5)], ["a", "b", "c", "d", "e"])
    arguments = (2, "compvis", 0.5, FACTOR)
    batches = data.batches(*arguments, rng := random.Random(1))
    next(batches)
    state, remaining = rng.getstate(), list(batches.remaining)
    expected = [next(batches) for _ in range(4)]
    later = data.batches(*arguments, other := random.Random(2))
    later.remaining = remaining
    other.setstate(state)
    for batch in expected:
        again = next(later)
        assert (again.positions, again.flipped) == (batch.positions, batch.flipped)
        for view, same in zip(batch.views, again.views, strict=True):
            assert torch.equal(view.pixels, same.pixels) and view.prefix == same.prefix


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_hflip_mirrors(hflip):
    data = AnchorData([picture()], ["a"])
    batch = next(data.batches(1, "none", hflip, FACTOR, random.Random(1)))
    pixels = torch.from_numpy(np.asarray(picture(), np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(batch.views[0].pixels, pixels.flip(2) if hflip else pixels)
    assert batch.flipped == [bool(hflip)]


def test_images_are_cut_to_their_middle_square():
    data = AnchorData([picture(size=(96, 64))], ["a"])
    assert np.array_equal(np.asarray(data.images[0]), np.asarray(picture(size=(96, 64)))[:, 16:80])
    with pytest.raises(DataError, match="need one size"):
        AnchorData([picture(), picture(size=(32, 32))], ["a", "b"])
    with pytest.raises(DataError, match="0 images"):
        AnchorData([], [])


def drawn(batch, seed=0):
    """Noise of the latents' shape."""
    shape = (len(batch.views), 4, *batch.mask.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(make_tiny_pipeline(tmp_path_factory.mktemp("tiny")), device="cpu")


def test_latents_are_the_posterior_scaled_and_whole_images_are_encoded_once(pipeline, monkeypatch):
    data, encoder = AnchorData([picture(i) for i in range(3)], list("abc")), Encoder(pipeline)
    batch = next(data.batches(3, "none", 0.0, FACTOR, random.Random(0)))
    pixels = torch.stack([view.pixels for view in batch.views])
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    noise = drawn(batch, 3)
    expected = (posterior.mean + posterior.std * noise) * pipeline.vae.config.scaling_factor
    assert torch.allclose(encoder.latents(batch, noise), expected, atol=1e-5)
    monkeypatch.setattr(pipeline.vae, "encode", None)
    assert torch.allclose(encoder.latents(batch, noise), expected, atol=1e-5)


def test_scaled_views_of_one_image_keep_their_own_latents(pipeline):
    data, encoder = AnchorData([picture()], ["a"]), Encoder(pipeline)
    batch = next(data.batches(6, "compvis", 0.0, FACTOR, random.Random(0)))
    pixels = torch.stack([view.pixels for view in batch.views])
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    spread = pipeline.vae.config.scaling_factor * 6
    latents = [encoder.latents(batch, drawn(batch, seed)) for seed in range(100)]
    assert len({view.whole for view in batch.views}) == 2
    assert abs(torch.stack(latents).mean(0) - mean).max() < spread / 100**0.5


def test_text_is_encoded_once_as_the_pipeline_does(pipeline, monkeypatch):
    encoder = Encoder(pipeline)
    with torch.no_grad():
        expected = pipeline.encode_prompt(["a cat", "an owl"], "cpu", 1, False)[0]
    encoded = encoder.text(["a cat", "an owl", "a cat"]).hidden
    assert torch.allclose(encoded, expected[[0, 1, 0]], atol=1e-5) and not encoded.requires_grad
    monkeypatch.setattr(pipeline, "encode_prompt", None)
    assert torch.equal(encoder.text(["an owl"]).hidden, encoded[1:2])


def test_an_encoding_does_not_depend_on_its_batch(pipeline):
    """To the last bit, so that a training which goes on, with nothing encoded yet, repeats one that ran on."""
    data = AnchorData([picture(i) for i in range(4)], list("abcd"))
    batch = next(data.batches(4, "none", 0.0, FACTOR, random.Random(0)))
    texts = ["a cat", "an owl", "a red fox on a mat"]
    together = Encoder(pipeline)
    together.text(texts), together.latents(batch, drawn(batch))
    for text in texts:
        assert torch.equal(Encoder(pipeline).text([text]).hidden, together.text([text]).hidden)
    for position, view in zip(batch.positions, batch.views, strict=True):
        alone = Encoder(pipeline)
        own = Batch([position], [False], [view])
        alone.latents(own, drawn(own))
        assert torch.equal(alone._moments[position, False], together._moments[position, False])


def test_encodings_in_chunks_are_those_of_each_alone(pipeline, monkeypatch):
    """On a CPU one at a time, on a GPU, which is played here, as many as the limits allow."""
    data = AnchorData([picture(i) for i in range(5)], list("abcde"))
    batch = next(data.batches(5, "compvis", 0.0, FACTOR, random.Random(1)))
    assert len({view.whole for view in batch.views}) == 2
    texts, calls = ["a cat", "an owl", "a fox", "an owl"], []
    encode, encode_prompt = pipeline.vae.encode, pipeline.encode_prompt
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: calls.append(len(x)) or encode(x))
    monkeypatch.setattr(
        pipeline,
        "encode_prompt",
        lambda texts, *rest: calls.append(len(texts)) or encode_prompt(texts, *rest),
    )
    monkeypatch.setattr("concept_ablation.methods.ablation.conditioning.PIXELS_AT_ONCE", 2 * SIZE**2)
    monkeypatch.setattr("concept_ablation.methods.ablation.conditioning.TEXTS_AT_ONCE", 2)

    def encodings():
        calls.clear()
        encoder = Encoder(pipeline)
        return encoder.latents(batch, drawn(batch)), encoder.text(texts).hidden, list(calls)

    *alone, sizes = encodings()
    assert sizes == [1] * 8
    monkeypatch.setattr(Encoder, "_at_once", lambda self, limit: limit)
    *chunked, sizes = encodings()
    assert sizes == [2, 2, 1, 2, 1]
    for one, other in zip(alone, chunked, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
