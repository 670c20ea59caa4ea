"""Methods without training. `uce`: its closed form against a dense solver and its own objective, its tokens, a row through its stage.
`none`: the unchanged weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_pipeline

from concept_ablation import apply_delta, load_pipeline
from concept_ablation.diffusion.delta import delta_shapes
from concept_ablation.methods.concept_editing import Subjects, edit
from concept_ablation.methods.stage import ablate_concept
from concept_ablation.methods.uce import METHOD

WIDTH, OUT = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("uce"))


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    pairs = [
        (draw(2, WIDTH, seed=1), draw(2, WIDTH, seed=2)),
        (draw(1, WIDTH, seed=3), draw(1, WIDTH, seed=4)),
    ]
    return draw(OUT, WIDTH, seed=0), pairs, [draw(3, WIDTH, seed=5)], 0.7, 0.3, 0.5


def test_the_closed_form_is_the_published_one(problem):
    """W = (lambda W0 + sum s_e v* c^T + sum s_p W0 p p^T)(lambda I + sum s_e c c^T + sum s_p p p^T)^-1, token by token."""
    weight, pairs, kept, erase, preserve, ridge = problem
    old = weight.numpy()
    first, second = ridge * old, ridge * np.eye(WIDTH)
    for targets, anchors in pairs:
        for c, star in zip(targets.numpy(), anchors.numpy(), strict=True):
            first = first + erase * np.outer(old @ star, c)
            second = second + erase * np.outer(c, c)
    for p in kept[0].numpy():
        first, second = first + preserve * np.outer(old @ p, p), second + preserve * np.outer(p, p)
    np.testing.assert_allclose(edit(*problem).numpy(), first @ np.linalg.inv(second), atol=1e-12)


def test_it_is_the_least_of_its_objective(problem):
    weight, pairs, kept, erase, preserve, ridge = problem
    found = edit(*problem).requires_grad_()
    loss = ridge * (found - weight).square().sum()
    for targets, anchors in pairs:
        loss = loss + erase * (found @ targets.T - weight @ anchors.T).square().sum()
    loss = loss + preserve * (found @ kept[0].T - weight @ kept[0].T).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-10


def test_with_next_to_no_ridge_the_target_gives_what_the_anchor_gave_and_what_is_orthogonal_stays():
    target, anchor, other = torch.eye(WIDTH, dtype=torch.float64)[:3].unsqueeze(1)
    weight = draw(OUT, WIDTH, seed=0)
    found = edit(weight, [(target, anchor)], [other], 1.0, 1.0, 1e-9)
    torch.testing.assert_close(found @ target.T, weight @ anchor.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(found @ other.T, weight @ other.T)


def test_the_tokens_are_the_subjects_last_or_it_and_all_after_it(pipeline):
    """The tiny tokenizer has a token a byte: begin-of-text, "a ", then the word."""
    last, rest = (Subjects(pipeline, "a {} here", tokens) for tokens in ("last", "rest"))
    (hidden,) = last.encoder.text(["a cat here"]).hidden
    spaces = len(last.tokenizer("a cat").input_ids) - 2
    torch.testing.assert_close(last.of("cat"), hidden[spaces : spaces + 1])
    torch.testing.assert_close(rest.of("cat"), hidden[spaces:])
    target, anchor = rest.pair("crocodile", "cat")
    assert len(target) == len(anchor) == len(rest.of("crocodile"))


def make_spec(folder, method="uce", **settings):
    model = {"path": str(folder), "revision": None}
    row = {"kind": "object", "targets": ["owl"], "anchor": "bird", "neighbors": ["duck"], "model": model}
    return {"stage": "ablate_concept", "method": method, **row, "templates": [], "settings": settings}


def run(folder, out, **settings):
    out.mkdir()
    files = {
        name: out / file for name, file in (("delta", "d.safetensors"), ("training", "t"), ("strength", "s"))
    }
    ablate_concept(make_spec(folder, **settings), **files, device="cpu")
    return files["delta"]


def keys_of(pipeline, word):
    subjects = Subjects(pipeline, "{}", "last")
    layers = subjects.encoder.family.text_projections(pipeline.unet)
    return torch.cat([layer(subjects.of(word)).flatten() for layer in layers.values()]).detach()


def test_a_rows_delta_moves_the_target_to_the_anchor_and_leaves_the_neighbor(folder, pipeline, tmp_path):
    delta = run(folder, tmp_path / "a", ridge=1e-3)
    before = {word: keys_of(pipeline, word) for word in ("owl", "bird", "duck")}
    apply_delta(pipeline, delta)
    after = {word: keys_of(pipeline, word) for word in before}
    gap = (before["owl"] - before["bird"]).norm()
    assert (after["owl"] - before["bird"]).norm() < 0.1 * gap
    for word in ("bird", "duck"):
        assert (after[word] - before[word]).norm() < 0.1 * gap
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in delta_shapes(delta))


def test_the_defaults_are_the_published_codes_and_a_spec_leaves_them_out(folder, tmp_path):
    published = {
        "strength": "fixed",
        "templates": ["{}"],
        "tokens": "last",
        "erase_scale": 1.0,
        "preserve_scale": 1.0,
        "ridge": 0.5,
    }
    assert METHOD.defaults == published
    own = {"method": {"name": "uce", "uce": {**published, "ridge": 0.1}}}
    assert METHOD.work(own, [])["settings"] == {"ridge": 0.1}
    first, second = (
        load_file(run(folder, tmp_path / name, **more)) for name, more in (("a", {}), ("b", {"ridge": 0.5}))
    )
    assert all(torch.equal(first[name], second[name]) for name in {*first, *second})


def test_method_none_changes_nothing(folder, pipeline, tmp_path):
    delta = run(folder, tmp_path / "a", method="none")
    before = keys_of(pipeline, "owl")
    apply_delta(pipeline, delta)
    assert torch.equal(keys_of(pipeline, "owl"), before) and len(delta_shapes(delta)) > 2
