"""Method `speed`: its closed form against a dense solver of the constrained problem, its parts, a row through its stage."""

import numpy as np
import pytest
import torch
from tiny import make_tiny_pipeline

from concept_ablation import apply_delta, load_pipeline
from concept_ablation.diffusion.delta import delta_shapes
from concept_ablation.methods.concept_editing import Subjects
from concept_ablation.methods.speed import METHOD, centers, null_projector, refine, solve
from concept_ablation.methods.stage import ablate_concept

WIDTH, OUT = 9, 5


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    """Two targets, three preserved encodings, two columns that stay exactly; six directions are free."""
    targets, anchors, retained = draw(2, WIDTH, seed=1), draw(2, WIDTH, seed=2), draw(3, WIDTH, seed=3)
    return draw(OUT, WIDTH, seed=0), targets, anchors, null_projector(retained, 1e-9), draw(2, WIDTH, seed=4), retained  # fmt: skip


def test_the_closed_form_is_the_constrained_least_squares_solution(problem):
    """D = X N^T with X N^T K = 0: solved as the stationary point of its Lagrangian, output by output, by a dense solver."""
    weight, targets, anchors, space, fixed, retained = problem
    found = solve(weight, targets, anchors, space, fixed, 0.3).numpy()
    null = np.linalg.svd(retained.numpy(), full_matrices=True)[2][len(retained) :].T  # (width, free)
    c, star, k = targets.numpy() @ null, anchors.numpy(), fixed.numpy() @ null
    for row in range(OUT):
        w = weight[row].numpy()
        gap = star @ w - targets.numpy() @ w
        normal = c.T @ c / len(c) + 0.3 * np.eye(null.shape[1])
        system = np.block([[normal, k.T], [k, np.zeros((len(k), len(k)))]])
        x = np.linalg.solve(system, np.concatenate([c.T @ gap / len(c), np.zeros(len(k))]))
        np.testing.assert_allclose(found[row], null @ x[: null.shape[1]], atol=1e-10)


def test_what_is_preserved_and_what_stays_exactly_do_not_move(problem):
    weight, targets, anchors, space, fixed, retained = problem
    change = solve(weight, targets, anchors, space, fixed, 0.3)
    assert (change @ retained.T).abs().max() < 1e-10 and (change @ fixed.T).abs().max() < 1e-10
    assert (change @ targets.T).norm() > 0.1


def test_with_enough_room_the_target_gives_what_the_anchor_gave(problem):
    weight, targets, anchors, space, fixed, _ = problem
    change = solve(weight, targets, anchors, space, fixed, 1e-9)
    torch.testing.assert_close((weight + change) @ targets.T, weight @ anchors.T, atol=1e-5, rtol=0)


def test_a_column_that_the_null_space_already_keeps_spoils_nothing(problem):
    """K^T G K has no inverse then."""
    weight, targets, anchors, space, fixed, retained = problem
    plain = solve(weight, targets, anchors, space, fixed, 0.3)
    more = solve(weight, targets, anchors, space, torch.cat([fixed, retained[:1]]), 0.3)
    torch.testing.assert_close(more, plain, atol=1e-9, rtol=0)


def test_the_copies_stray_where_the_layer_hears_least_and_the_filter_keeps_the_influenced(problem):
    weight, targets, anchors, _, _, retained = problem
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(refine(weight, targets, anchors, retained, False, 0, generator), retained)
    found = refine(weight, targets, anchors, retained, False, 4, generator)
    torch.testing.assert_close(found[:3], retained)
    assert 3 < len(found) <= 15
    strayed = found[3:, None] - retained
    heard = (strayed @ weight.T).norm(dim=-1).amin(1)
    assert heard.max() < 1e-10  # this layer has directions that it doesn't hear at all
    filtered = refine(weight, targets, anchors, retained, True, 1, generator)
    assert not torch.equal(filtered[: len(retained)], retained)


def test_centers_are_the_means_of_separate_heaps():
    heaps = torch.cat([draw(5, 2, seed=number) * 0.01 + 10 * number for number in range(3)])
    wanted = torch.stack([part.mean(0) for part in heaps.chunk(3)])
    found = centers(heaps, 3)
    torch.testing.assert_close(found[found[:, 0].argsort()], wanted)
    assert len(centers(heaps[:2], 3)) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("speed"))


def test_a_rows_delta_moves_the_target_and_leaves_the_neighbor_and_the_empty_prompts_first_token(
    folder, tmp_path
):
    row = {"kind": "object", "targets": ["owl"], "anchor": "bird", "neighbors": ["duck"]}
    settings = {"projections": "both", "augment": 0, "threshold": 1e-3, "retain_scale": 1e-3}
    spec = {"stage": "ablate_concept", "method": "speed", **row, "templates": [], "settings": settings}
    spec["model"] = {"path": str(folder), "revision": None}
    files = {"delta": tmp_path / "d.safetensors", "training": tmp_path / "t", "strength": tmp_path / "s"}
    ablate_concept(spec, **files, device="cpu")
    pipeline = load_pipeline(folder, device="cpu")
    subjects = Subjects(pipeline, "{}", "last")
    layers = subjects.encoder.family.text_projections(pipeline.unet)

    def keys_of(hidden):
        return torch.cat([layer(hidden).flatten() for layer in layers.values()]).detach()

    words = {word: subjects.of(word) for word in ("owl", "bird", "duck")}
    words["bos"] = subjects.encoder.text([""]).hidden[0, :1]
    before = {word: keys_of(hidden) for word, hidden in words.items()}
    apply_delta(pipeline, files["delta"])
    after = {word: keys_of(hidden) for word, hidden in words.items()}
    gap = (before["owl"] - before["bird"]).norm()
    assert (after["owl"] - before["bird"]).norm() < 0.9 * gap
    for word in ("bird", "duck", "bos"):
        assert (after[word] - before[word]).norm() < 0.05 * gap
    assert len(delta_shapes(files["delta"])) == len(layers)


def test_the_defaults_are_the_published_codes_and_edit_values_alone(folder):
    published = {"projections": "values", "threshold": 0.1, "retain_scale": 1.0, "augment": 10}
    assert published.items() <= METHOD.defaults.items()
    spec = {"targets": ["owl"], "anchor": "bird", "neighbors": ["duck"], "settings": {}}
    edited, records = METHOD.edit(spec, load_pipeline(folder, device="cpu"))
    assert edited and all(name.endswith("attn2.to_v.weight") for name in edited) and len(records) == 1
