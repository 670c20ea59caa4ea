"""Preserving what a row names: exactly in the null space, by a loss in distillation."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_training import DATA, PROMPTS, SETTINGS, TARGETS, changed, weights
from tiny import make_tiny_pipeline

from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.preservation import (
    NullSpace,
    preserved_prompts,
    second_moment,
    span,
)
from concept_ablation.methods.ablation.settings import TrainingError
from concept_ablation.methods.ablation.training import Training

KEPT = [*PROMPTS[:2], "a dog"]
WORLD = (
    Path(__file__).parents[1] / "embedded" / "emoji-diffusion"
)  # its text is wide enough to have a null space


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def train(pipeline, prompts=KEPT, **changes):
    settings = dataclasses.replace(SETTINGS, **{"steps": 6, "learning_rate": 1e-2, **changes})
    training = Training(pipeline, DATA, TARGETS, settings, seed=0, preserved=prompts)
    return training, list(training)


def outputs(pipeline, prompt):
    """Keys and values of a prompt in every layer that reads text."""
    hidden = FAMILY.encode_prompts(pipeline, [prompt]).hidden
    with torch.no_grad():
        return [layer(hidden) for layer in FAMILY.text_projections(pipeline.unet).values()]


def distance(before, after):
    return max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))


@pytest.fixture
def world():
    return load_pipeline(WORLD, device="cpu")


def test_the_null_space_leaves_keys_and_values_of_preserved_prompts_as_they_were(world):
    pipeline = world
    before = {prompt: outputs(pipeline, prompt) for prompt in [*KEPT, "", "an owl"]}
    train(pipeline, preserve="null-space", preserve_tolerance=1e-12)
    for prompt in [*KEPT, ""]:  # the empty prompt, too, since guidance leads away from it
        assert distance(before[prompt], outputs(pipeline, prompt)) < 1e-5, prompt
    assert distance(before["an owl"], outputs(pipeline, "an owl")) > 1e-2


def test_without_it_they_move(pipeline):
    before = outputs(pipeline, KEPT[0])
    train(pipeline, preserve="none")
    assert distance(before, outputs(pipeline, KEPT[0])) > 1e-2


def test_a_wider_tolerance_keeps_fewer_directions(world):
    ranks = [
        train(world, steps=0, preserve="null-space", preserve_tolerance=tolerance)[0].null_space.rank
        for tolerance in (1e-12, 1e-2, 0.5)
    ]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1] >= 1


def test_the_span_is_that_of_the_largest_eigenvectors():
    directions = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))[0]
    strengths = torch.tensor([1.0, 0.1, 0.001])
    encodings = (directions * strengths.sqrt()).T[None]  # three tokens
    moment = second_moment([encodings])
    assert torch.allclose(moment, ((directions * strengths) @ directions.T / 3).double(), atol=1e-7)
    kept = span(moment, 0.01)
    assert kept.shape == (6, 2)
    assert torch.allclose(kept @ kept.T, (directions[:, :2] @ directions[:, :2].T).double(), atol=1e-6)


def test_projection_equals_least_squares():
    """The projected change is the nearest one, in Frobenius' norm, of those that leave the preserved inputs alone."""
    generator = torch.Generator().manual_seed(0)
    layer, inputs = torch.nn.Linear(5, 4, bias=False), torch.randn(2, 5, generator=generator)
    start, wanted = layer.weight.detach().clone(), torch.randn(4, 5, generator=generator)
    basis = torch.linalg.qr(inputs.T)[0]
    space = NullSpace([layer.weight], basis)
    with torch.no_grad():
        layer.weight.add_(wanted)
    space.project()
    nearest = wanted - wanted @ inputs.T @ torch.linalg.solve(inputs @ inputs.T, inputs)
    assert torch.allclose(layer.weight - start, nearest, atol=1e-5)


def test_distillation_is_drawn_last_and_held_to_the_unchanged_network(pipeline):
    """A training whose preserved prompts are its targets' can't move these: both losses pull at the same predictions."""
    _, plain = train(pipeline, steps=1, preserve="none")
    _, records = train(load_pipeline(pipeline.name_or_path, device="cpu"), steps=1, preserve="distill")
    assert records[0].loss == plain[0].loss  # no draw of the other loss has changed
    assert records[0].preserve_loss == 0  # before the first step nothing has moved
    _, records = train(load_pipeline(pipeline.name_or_path, device="cpu"), preserve="distill")
    assert records[-1].preserve_loss > 0


def test_distillation_moves_preserved_prompts_less(folder):
    moved = []
    for way in ("none", "distill"):
        own = load_pipeline(folder, device="cpu")
        before = outputs(own, KEPT[0])
        train(own, preserve=way, preserve_weight=10.0, steps=20)
        moved.append(distance(before, outputs(own, KEPT[0])))
    assert moved[1] < moved[0]


@pytest.mark.parametrize("group", ["attn", "full-weight"])
def test_groups_that_are_not_linear_in_the_text_are_refused(pipeline, group):
    with pytest.raises(TrainingError, match="take parameter_group cross-attn, or preserve distill"):
        train(pipeline, preserve="null-space", group=group)


def test_only_keys_and_values_change(world):
    pipeline, before = world, weights(world)
    train(pipeline, steps=1, preserve="both")
    assert all(".attn2.to_" in name for name in changed(before, pipeline))


def test_preserved_prompts_of_each_kind():
    def prompts(kind, anchor, neighbors, targets, templates=(), general=()):
        spec = {"kind": kind, "anchor": anchor, "neighbors": neighbors, "targets": targets}
        spec |= {"training": {"style_templates": list(templates)}, "preserve_prompts": list(general)}
        return preserved_prompts(spec, [f"a {anchor}", f"one {anchor}"])

    assert prompts("object", "cat", ["lynx"], ["owl"], general=["an owl", "Owls", "a house"]) == [
        "a cat", "one cat", "lynx", "a lynx", "one lynx", "a house",
    ]  # fmt: skip
    style = prompts("style", "picture", ["ink"], ["neon"], ["{prompt}, {target} style"])
    assert style == ["a picture", "one picture", "a picture, ink style", "one picture, ink style"]
    assert prompts("memorization", "poster", ["the lost island"], ["the garden"]) == [
        "a poster", "one poster", "the lost island", "a the lost island", "one the lost island",
    ]  # fmt: skip
