"""The losses against formulas written out with loops, on tensors small enough to check by hand."""

import pytest
import torch

from concept_ablation.diffusion.families.base import ModelError
from concept_ablation.diffusion.families.stable_diffusion import DiffusionSchedule
from concept_ablation.methods.ablation.losses import (
    masked_mse,
    model_based_loss,
    noise_based_loss,
    prior_loss,
)

N, C, H, W = 3, 2, 4, 4


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = normal(0, N, C, H, W), normal(1, N, C, H, W)
TIMESTEPS = torch.tensor([0, 500, 999])
TARGET, ANCHOR = normal(2, N, 3, 5), normal(3, N, 3, 5)
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]]).repeat(N, 1, 1, 1)
MASK[2] = 1


def schedule(kind):
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DiffusionSchedule({**levels, "prediction_type": kind})


def alpha(timestep):
    """Cumulative product of 1 - beta at a timestep, Stable Diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return float(torch.prod(1 - betas[: timestep + 1]))


class Network:
    """Predicts w x noisy x mean of the text: simple enough to differentiate by hand."""

    def __init__(self, w=1.5):
        self.w = torch.tensor(w, requires_grad=True)

    def __call__(self, noisy, timesteps, text):
        return self.w * noisy * text.mean((1, 2)).view(-1, 1, 1, 1)


def by_hand(prediction, target, mask):
    total = 0.0
    for n in range(N):
        errors = cells = 0.0
        for y in range(H):
            for x in range(W):
                cells += float(mask[n, 0, y, x])
                for c in range(C):
                    errors += (
                        float(mask[n, 0, y, x]) * float(prediction[n, c, y, x] - target[n, c, y, x]) ** 2
                    )
        total += errors / cells
    return total / N


def test_masked_mse():
    assert float(masked_mse(LATENTS, NOISE, MASK)) == pytest.approx(by_hand(LATENTS, NOISE, MASK), rel=1e-6)
    ones = torch.ones_like(MASK)
    mean = float((LATENTS - NOISE).square().mean())
    assert float(masked_mse(LATENTS, NOISE, ones)) == pytest.approx(C * mean, rel=1e-6)


def test_masked_mse_ignores_what_is_outside():
    inside = (MASK > 0).expand_as(LATENTS)
    far = torch.where(inside, LATENTS, torch.tensor(1e6))
    assert torch.equal(masked_mse(far, NOISE, MASK), masked_mse(LATENTS, NOISE, MASK))


def test_masked_mse_is_fp32():
    loss = masked_mse(LATENTS.bfloat16(), NOISE.bfloat16(), MASK)
    assert loss.dtype == torch.float32
    rounded = LATENTS.bfloat16().float(), NOISE.bfloat16().float()
    assert float(loss) == pytest.approx(by_hand(*rounded, MASK), rel=1e-5)


def test_model_based_loss_and_its_stop_gradient():
    network = Network()
    loss = model_based_loss(network, network, LATENTS, TIMESTEPS, TARGET, ANCHOR, MASK)
    loss.backward()
    w, target, anchor = 1.5, TARGET.mean((1, 2)), ANCHOR.mean((1, 2))
    energy = ((LATENTS**2 * MASK).sum((1, 2, 3)) / MASK.sum((1, 2, 3))).double()
    gap = (w * target - w * anchor).double()
    assert float(loss.detach()) == pytest.approx(float((gap**2 * energy).mean()), rel=1e-5)
    stopped = float((2 * gap * target * energy).mean())
    through = float((2 * gap * (target - anchor) * energy).mean())
    assert float(network.w.grad) == pytest.approx(stopped, rel=1e-5)
    assert float(network.w.grad) != pytest.approx(through, rel=1e-2)


def test_model_based_loss_takes_the_anchor_from_the_teacher():
    network, teacher = Network(), Network(0.5)
    loss = model_based_loss(network, teacher, LATENTS, TIMESTEPS, TARGET, ANCHOR, MASK)
    goal = 0.5 * LATENTS * ANCHOR.mean((1, 2)).view(-1, 1, 1, 1)
    prediction = 1.5 * LATENTS * TARGET.mean((1, 2)).view(-1, 1, 1, 1)
    assert float(loss.detach()) == pytest.approx(by_hand(prediction, goal, MASK), rel=1e-5)
    loss.backward()
    assert teacher.w.grad is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_losses(kind):
    noisy, goal = torch.empty_like(LATENTS), torch.empty_like(LATENTS)
    for n, timestep in enumerate(TIMESTEPS.tolist()):
        a = alpha(timestep)
        noisy[n] = a**0.5 * LATENTS[n] + (1 - a) ** 0.5 * NOISE[n]
        goal[n] = NOISE[n] if kind == "epsilon" else a**0.5 * NOISE[n] - (1 - a) ** 0.5 * LATENTS[n]
    drawn = (LATENTS, NOISE, TIMESTEPS)
    found = schedule(kind).target(*drawn)
    assert torch.allclose(found, goal, atol=1e-4)
    prediction = 1.5 * noisy * TARGET.mean((1, 2)).view(-1, 1, 1, 1)
    parts = (Network(), schedule(kind).add_noise(*drawn), TIMESTEPS, TARGET, found)
    assert float(noise_based_loss(*parts, MASK).detach()) == pytest.approx(
        by_hand(prediction, goal, MASK), rel=1e-4
    )
    ones = torch.ones_like(MASK)
    assert float(prior_loss(*parts).detach()) == pytest.approx(by_hand(prediction, goal, ones) / C, rel=1e-4)


def test_other_prediction_types_are_refused():
    with pytest.raises(ModelError, match="'sample' can't be trained .allowed: epsilon, v_prediction"):
        schedule("sample").target(LATENTS, NOISE, TIMESTEPS)
