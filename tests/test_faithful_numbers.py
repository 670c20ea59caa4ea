"""Losses and gradients of keys and values, pinned by numbers that plain formulas in double precision gave.

bench/faithfulness.py compares the same quantities with the authors' code (docs/faithfulness.md). The network is
one cross-attention layer; its weights, the inputs, and the numbers are in tests/data/faithful_numbers.safetensors,
which `python tests/test_faithful_numbers.py` writes.
"""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import nn

from concept_ablation.diffusion.families.stable_diffusion import FAMILY, DiffusionSchedule
from concept_ablation.methods.ablation.losses import model_based_loss, noise_based_loss, prior_loss

FILE = Path(__file__).parent / "data" / "faithful_numbers.safetensors"
N, C, SIDE, TOKENS, WIDTH, HEADS = 3, 4, 4, 5, 6, 2
WEIGHTS = {"doubled": 1.0, "halved": 0.2}
CASES = list(
    itertools.product(["model-based", "noise-based"], ["none", "doubled", "halved"], ["whole", "masked"])
)


class Network(nn.Module):
    """Predicts the noisy latents, scaled, plus cross-attention of their cells to the text."""

    def __init__(self, weights):
        super().__init__()
        self.attn2 = Attention(C, WIDTH, heads=HEADS, dim_head=C, bias=False)
        self.attn2.load_state_dict(
            {f"{name}.weight": weights[name] for name in ("to_q", "to_k", "to_v")}
            | {"to_out.0.weight": weights["to_out"], "to_out.0.bias": torch.zeros(C)}
        )

    def forward(self, noisy, timesteps, text):
        cells = noisy.flatten(2).transpose(1, 2)
        return 0.5 * noisy + self.attn2(cells, text).transpose(1, 2).reshape(noisy.shape)


def predict(stored, noisy, text, keys, values):
    """`Network`, in plain products."""
    k, v = (torch.einsum("ntw,dw->ntd", text, weight) for weight in (keys, values))
    k, v = (torch.cat([part[:, :1].detach(), part[:, 1:]], 1) for part in (k, v))
    cells = noisy.flatten(2).transpose(1, 2)
    q = torch.einsum("npc,dc->npd", cells, stored["to_q"])
    heads = []
    for h in range(HEADS):
        part = slice(h * C, (h + 1) * C)
        scores = torch.einsum("npd,ntd->npt", q[..., part], k[..., part]) / C**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("npt,ntd->npd", weights, v[..., part]))
    out = torch.einsum("npd,cd->npc", torch.cat(heads, -1), stored["to_out"])
    return 0.5 * noisy + out.transpose(1, 2).reshape(noisy.shape)


def formulas(stored, loss, prior, masked):
    """The total loss and its gradients of keys and values, in double precision."""
    stored = {n: v.double() if v.is_floating_point() else v for n, v in stored.items()}
    keys, values = (stored[name].clone().requires_grad_() for name in ("to_k", "to_v"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def noised(part):
        a = alphas[stored[f"{part}timesteps"]].view(-1, 1, 1, 1)
        return a.sqrt() * stored[f"{part}latents"] + (1 - a).sqrt() * stored[f"{part}noise"]

    def summed(error):
        mask = stored["mask"] if masked == "masked" else torch.ones_like(stored["mask"])
        return ((error**2 * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()

    noisy = noised("")
    anchor = predict(stored, noisy, stored["anchor_text"], keys, values).detach()
    goal = anchor if loss == "model-based" else stored["noise"]
    total = summed(predict(stored, noisy, stored["target_text"], keys, values) - goal)
    if prior != "none":
        error = predict(stored, noised("prior_"), stored["anchor_text"], keys, values) - stored["prior_noise"]
        total = total + WEIGHTS[prior] * (summed(error) if prior == "halved" else (error**2).mean())
    return total, *torch.autograd.grad(total, (keys, values))


@pytest.mark.parametrize(("loss", "prior", "masked"), CASES)
def test_losses_and_gradients(loss, prior, masked):
    stored = load_file(FILE)
    network = Network(stored)
    schedule = DiffusionSchedule(
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        }
    )
    mask = stored["mask"] if masked == "masked" else torch.ones_like(stored["mask"])
    drawn = [stored[name] for name in ("latents", "noise", "timesteps")]
    priors = [stored[f"prior_{name}"] for name in ("latents", "noise", "timesteps")]
    target, anchor = stored["target_text"], stored["anchor_text"]
    with FAMILY.detach_bos(network):
        noisy = schedule.add_noise(*drawn)
        if loss == "model-based":
            total = model_based_loss(network, network, noisy, drawn[2], target, anchor, mask)
        else:
            total = noise_based_loss(network, noisy, drawn[2], target, schedule.target(*drawn), mask)
        parts = (network, schedule.add_noise(*priors), priors[2], anchor, schedule.target(*priors))
        if prior == "doubled":
            total = total + WEIGHTS[prior] * prior_loss(*parts)
        if prior == "halved":
            total = total + WEIGHTS[prior] * noise_based_loss(*parts, mask)
        total.backward()
    expected = {name: stored[f"{loss}, {prior}, {masked}: {name}"] for name in ("loss", "to_k", "to_v")}
    assert float(total.detach()) == pytest.approx(float(expected["loss"]), rel=1e-5)
    for name in ("to_k", "to_v"):
        gradient = getattr(network.attn2, name).weight.grad
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-4


def make_numbers():
    """Write the inputs and what `formulas` gives for each case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    stored = {"to_q": normal(HEADS * C, C), "to_out": normal(C, HEADS * C)}
    stored |= {name: normal(HEADS * C, WIDTH) for name in ("to_k", "to_v")}
    for part in ("", "prior_"):
        stored |= {f"{part}latents": normal(N, C, SIDE, SIDE), f"{part}noise": normal(N, C, SIDE, SIDE)}
        stored[f"{part}timesteps"] = torch.randint(1000, (N,), generator=generator)
    stored |= {"target_text": normal(N, TOKENS, WIDTH), "anchor_text": normal(N, TOKENS, WIDTH)}
    stored["target_text"][:, 0] = stored["anchor_text"][:, 0]  # begin-of-text
    stored["mask"] = (normal(N, 1, SIDE, SIDE) > 0).float()
    for case in CASES:
        loss, keys, values = formulas(stored, *case)
        for name, value in (("loss", loss.detach()), ("to_k", keys), ("to_v", values)):
            stored[f"{', '.join(case)}: {name}"] = value.float()
    FILE.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in stored.items()}, FILE)


if __name__ == "__main__":
    make_numbers()
