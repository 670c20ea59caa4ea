"""Method `esd`: its loss and gradient against finite differences, what it trains, where its latents come from, a row through its stage."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_pipeline

from concept_ablation import apply_delta, load_pipeline
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.methods.ablation.settings import TrainingError
from concept_ablation.methods.esd import METHOD, EsdTraining, chosen_parameters, esd_loss
from concept_ablation.methods.stage import ablate_concept

SHORT = {"steps": 2, "sampling_steps": 3, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("esd"))


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


class Toy(torch.nn.Module):
    """Two layers in fp64: a prediction of latents (n, 2, 2, 2) that depends on the text and on the time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (
            torch.nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64)) for _ in range(2)
        )

    def forward(self, noisy, timesteps, text):
        hidden = torch.tanh(noisy.flatten(1) @ self.first + text + timesteps[:, None] / 1000)
        return (hidden @ self.second).view_as(noisy)


def problem():
    generator = torch.Generator().manual_seed(1)
    noisy, target = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 2, 2), (8,))
    )
    return Toy(), noisy, torch.tensor([10.0, 500.0, 900.0]), target, torch.zeros_like(target)


def loss_of(toy, unchanged, noisy, times, target, empty):
    """The formula of the paper, written out. fp32 as the loss is, but for the sums."""
    with torch.no_grad():
        plain, towards = unchanged(noisy, times, empty), unchanged(noisy, times, target)
    return ((toy(noisy, times, target) - (plain - 0.7 * (towards - plain))) ** 2).mean()


def test_the_loss_is_the_formula_and_its_gradient_that_of_finite_differences(monkeypatch):
    toy, *inputs = problem()
    unchanged = copy.deepcopy(toy)
    with torch.no_grad():  # the network in training is another one by now
        toy.first += 0.1
    loss = esd_loss(toy, unchanged, *inputs, 0.7)
    torch.testing.assert_close(loss.double(), loss_of(toy, unchanged, *inputs), rtol=1e-5, atol=0)
    loss.backward()
    assert all(value.grad is None for value in unchanged.parameters())
    for parameter in (toy.first, toy.second):
        for place in ((0, 0), (3, 5), (7, 2)):
            sides = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    parameter[place] += step
                sides.append(loss_of(toy, unchanged, *inputs))
            with torch.no_grad():
                parameter[place] += 1e-5
            slope = (sides[0] - sides[1]) / 2e-5
            torch.testing.assert_close(parameter.grad[place], slope.detach(), rtol=1e-3, atol=1e-5)


def test_led_back_by_as_much_nothing_is_to_learn():
    """With eta -1 the goal is what the unchanged network gives for the target: no loss at the start."""
    toy, *inputs = problem()
    assert esd_loss(toy, copy.deepcopy(toy), *inputs, -1.0).item() < 1e-12


def test_x_and_u_are_the_cross_attention_and_the_rest(pipeline):
    layers = family_of(pipeline).text_projections(pipeline.unet)
    x, strict, u = (set(chosen_parameters(pipeline.unet, layers, name)) for name in ("x", "x-strict", "u"))
    assert strict == {f"{name}.weight" for name in layers}
    assert strict < x and all(".attn2." in name for name in x) and not x & u
    linear = {name for name, value in pipeline.unet.named_parameters() if "norm" not in name}
    assert x | u == linear


def make_spec(folder, **settings):
    row = {"kind": "object", "targets": ["owl", "eagle"], "anchor": "bird"}
    model = {"path": str(folder), "revision": None}
    return {"stage": "ablate_concept", "method": "esd", **row, "model": model, "templates": [], "settings": settings}  # fmt: skip


def run(folder, out, **settings):
    out.mkdir()
    files = {
        name: out / file for name, file in (("delta", "d.safetensors"), ("training", "t"), ("strength", "s"))
    }
    ablate_concept(make_spec(folder, **{**SHORT, **settings}), **files, device="cpu")
    return files["delta"]


@pytest.mark.parametrize("parameters", ["x", "x-strict", "u"])
def test_a_rows_delta_holds_what_was_trained_and_repeats(folder, pipeline, tmp_path, parameters):
    first, second = (load_file(run(folder, tmp_path / name, parameters=parameters)) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in {*first, *second})
    layers = family_of(pipeline).text_projections(pipeline.unet)
    assert {name.removeprefix("unet.") for name in first} == set(
        chosen_parameters(pipeline.unet, layers, parameters)
    )
    base = {f"unet.{name}": value for name, value in pipeline.unet.named_parameters()}
    assert any(not torch.equal(first[name], base[name]) for name in first)
    apply_delta(pipeline, tmp_path / "a" / "d.safetensors")


def test_training_moves_the_targets_prediction_to_the_goal_and_puts_the_pipeline_back(pipeline):
    before = {name: value.clone() for name, value in pipeline.unet.named_parameters()}
    settings = {**METHOD.defaults, **SHORT, "steps": 40, "learning_rate": 1e-3}
    edited, records = METHOD.edit({"targets": ["owl"], "settings": settings}, pipeline)
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.named_parameters())
    assert [record["step"] for record in records] == list(range(1, 41))
    early, late = (sum(record["loss"] for record in part) for part in (records[:10], records[-10:]))
    assert late < early and edited


def test_the_first_latents_are_plain_noise_or_sampled_so_far(pipeline):
    training = EsdTraining(pipeline, ["owl"], {**METHOD.defaults, **SHORT, "batch_size": 2})
    found = [training._latents(training.texts["owl"], training.texts[""]) for _ in range(8)]
    assert {int(times[0]) for _, times in found} <= {1, 334, 667} and len({int(t[0]) for _, t in found}) > 1
    assert all(latents.shape == (2, 4, 8, 8) and torch.isfinite(latents).all() for latents, _ in found)


def test_latents_come_from_the_network_in_training_or_from_the_unchanged_one(pipeline):
    """Only after a step do the two differ."""
    found = {}
    for by in ("current", "base"):
        training = EsdTraining(
            pipeline, ["owl"], {**METHOD.defaults, **SHORT, "latents_by": by, "learning_rate": 1e-2}
        )
        next(iter(training))
        training.generator.manual_seed(3)
        found[by] = [training._latents(training.texts["owl"], training.texts[""])[0] for _ in range(4)]
        with torch.no_grad():
            for name, value in training.start.items():
                training.parameters[name].copy_(value)
    assert any(
        not torch.allclose(one, other) for one, other in zip(found["current"], found["base"], strict=True)
    )


def test_a_loss_that_is_no_number_ends_it(pipeline):
    with pytest.raises(TrainingError, match=r"lower method.esd.learning_rate"):
        list(EsdTraining(pipeline, ["owl"], {**METHOD.defaults, **SHORT, "steps": 9, "learning_rate": 1e30}))
