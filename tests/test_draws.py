"""What a training draws: in one order, from two generators, and on from a checkpoint as if it had never stopped."""

import random

import pytest
import torch
from test_training import DATA, PROMPTS, SETTINGS, TARGETS

from concept_ablation.diffusion.families.stable_diffusion import DiffusionSchedule
from concept_ablation.methods.ablation.draws import TrainingDraws

SCHEDULE = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def make_draws(seed=0, **changes):
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "augmentation": "compvis", "hflip": 0.5, **changes})
    schedule = DiffusionSchedule(SCHEDULE)
    return TrainingDraws(DATA, TARGETS, settings, seed, schedule, channels=4, vae_factor=8)


def same(one, other):
    """Whether two losses were drawn alike."""
    if one is None or other is None:
        return one is other
    tensors = [(getattr(one, n), getattr(other, n)) for n in ("posterior_noise", "noise", "timesteps")]
    tensors += [(a.pixels, b.pixels) for a, b in zip(one.batch.views, other.batch.views, strict=True)]
    texts = one.prompts == other.prompts and one.anchor_prompts == other.anchor_prompts
    return texts and all(torch.equal(*pair) for pair in tensors)


def test_the_order_of_the_draws_is_the_documented_one():
    draws = make_draws(3, augmentation="none", prior_preservation=True)
    batch = draws.next_batch()
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    for loss in (batch.target, batch.prior):
        assert loss.batch.positions == rng.sample(range(4), 4)
        assert loss.batch.flipped == [rng.random() < 0.5 for _ in range(4)]
        own = [PROMPTS[i] for i in loss.batch.positions]
        assert loss.anchor_prompts == own
        chosen = [rng.choice(TARGETS[i]) for i in loss.batch.positions] if loss is batch.target else own
        assert loss.prompts == chosen
        for noise in (loss.posterior_noise, loss.noise):
            assert torch.equal(noise, torch.randn(4, 4, 4, 4, generator=generator))
        assert torch.equal(loss.timesteps, torch.randint(1000, (4,), generator=generator))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prior_preservation": True},
        {"prior_preservation": True, "prior_form": "halved"},
        {"batch_size": 3},
    ],
)
def test_draws_go_on_from_a_state(changes):
    draws, other = make_draws(1, **changes), make_draws(2, **changes)
    for _ in range(3):
        draws.next_batch()
    other.restore(draws.state())
    for _ in range(3):
        one, again = draws.next_batch(), other.next_batch()
        assert same(one.target, again.target) and same(one.prior, again.prior)
        assert (one.prior is not None) == bool(changes.get("prior_preservation"))


def test_seeds_draw_differently():
    assert not same(make_draws(1).next_batch().target, make_draws(2).next_batch().target)


def test_half_of_a_halved_batch_is_the_priors_with_its_prefixes():
    draws = make_draws(prior_preservation=True, prior_form="halved", batch_size=4)
    batches = [draws.next_batch() for _ in range(20)]
    assert {len(loss.prompts) for batch in batches for loss in (batch.target, batch.prior)} == {2}
    prefixed = [prompt for batch in batches for prompt in batch.prior.prompts if prompt not in PROMPTS]
    assert prefixed and all(prompt.endswith(tuple(PROMPTS)) for prompt in prefixed)
