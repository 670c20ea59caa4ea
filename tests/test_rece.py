"""Method `rece`: the reviving encoding against least squares and its own gradient, its rounds, a row through its stage."""

import numpy as np
import pytest
import torch
from tiny import make_tiny_pipeline

from concept_ablation import load_pipeline
from concept_ablation.methods.concept_editing import Subjects, edit
from concept_ablation.methods.rece import METHOD, reviving
from concept_ablation.methods.uce import METHOD as UCE

WIDTH = 6


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layers():
    """Three projections of different sizes, before and after an edit."""
    first = [draw(out, WIDTH, seed=out) for out in (4, 5, 3)]
    return [one + 0.3 * draw(*one.shape, seed=9) for one in first], first


def test_the_reviving_encoding_is_the_least_squares_solution(layers):
    edited, first = layers
    token = draw(WIDTH, seed=20)
    rows = np.concatenate([*(one.numpy() for one in edited), np.sqrt(0.2) * np.eye(WIDTH)])
    wanted = np.concatenate([*((one @ token).numpy() for one in first), np.zeros(WIDTH)])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose((reviving(edited, first, 0.2) @ token).numpy(), solution, atol=1e-10)


def test_its_objective_has_no_gradient_there(layers):
    edited, first = layers
    token = draw(WIDTH, seed=21)
    found = (reviving(edited, first, 0.2) @ token).requires_grad_()
    loss = 0.2 * found.square().sum()
    for now, before in zip(edited, first, strict=True):
        loss = loss + (now @ found - before @ token).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-10


def test_where_nothing_was_edited_a_token_revives_itself(layers):
    _, first = layers
    torch.testing.assert_close(reviving(first, first, 1e-9), torch.eye(WIDTH, dtype=torch.float64), atol=1e-6, rtol=0)  # fmt: skip


def test_a_round_leaves_less_of_what_revives_the_target(layers):
    """How near the best encoding comes to what the target once gave, before and after it was erased, too."""
    _, first = layers
    token, anchor = draw(1, WIDTH, seed=22), draw(1, WIDTH, seed=23)

    def gap(weights):
        again = reviving(weights, first, 0.1)
        return sum(
            (now @ again @ token.T - one @ token.T).square().sum()
            for now, one in zip(weights, first, strict=True)
        )

    once = [edit(one, [(token, anchor)], [], 1.0, 0.1, 0.1) for one in first]
    revived = token @ reviving(once, first, 0.1).T
    twice = [edit(one, [(revived, anchor)], [], 1.0, 0.1, 0.1) for one in once]
    assert gap(first) < gap(once) < gap(twice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("rece"))


def test_without_rounds_it_is_uce_and_each_round_is_recorded(folder):
    pipeline = load_pipeline(folder, device="cpu")
    row = {"targets": ["owl"], "anchor": "bird", "neighbors": ["duck"]}
    same = {name: METHOD.defaults[name] for name in ("tokens", "erase_scale", "preserve_scale", "ridge")}
    plain, _ = UCE.edit({**row, "settings": same}, pipeline)
    found, records = METHOD.edit({**row, "settings": {"rounds": 0}}, pipeline)
    assert all(torch.equal(found[name], plain[name]) for name in {*found, *plain}) and len(records) == 1
    further, records = METHOD.edit({**row, "settings": {"rounds": 2}}, pipeline)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert any(not torch.equal(further[name], plain[name]) for name in plain)


def test_after_a_round_what_revived_the_target_gives_what_the_anchor_gave_and_the_neighbor_stays(folder):
    pipeline = load_pipeline(folder, device="cpu")
    spec = {"targets": ["owl"], "anchor": "bird", "neighbors": ["duck"]}
    plain = {"ridge": 1e-3, "preserve_scale": 1.0, "tokens": "last"}
    once, twice = (METHOD.edit({**spec, "settings": {**plain, "rounds": n}}, pipeline)[0] for n in (0, 1))
    subjects = Subjects(pipeline, "{}", "last")
    owl, bird, duck = (subjects.of(word).detach() for word in ("owl", "bird", "duck"))
    first = {name: pipeline.unet.get_parameter(name.removeprefix("unet.")).detach() for name in once}
    moved = reviving(list(once.values()), list(first.values()), METHOD.defaults["regularization"])
    revived = (owl.double() @ moved.T).float()
    for name, weight in twice.items():
        gap = ((owl - bird) @ first[name].T).norm()
        assert ((revived @ weight.T) - bird @ first[name].T).norm() < 0.3 * gap
        assert ((duck @ (weight - first[name]).T).norm()) < 0.3 * gap


def test_the_defaults_are_the_published_scripts():
    published = {"rounds": 3, "erase_scale": 1.0, "preserve_scale": 0.1, "ridge": 0.1, "regularization": 0.1}
    assert published.items() <= METHOD.defaults.items()
