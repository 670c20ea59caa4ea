"""Merging changes: the closed form against a dense solver and on cases with a known answer, sums, and TIES against peft's."""

import numpy as np
import pytest
import torch

from concept_ablation.methods.ablation.preservation import NullSpace, second_moment, span
from concept_ablation.methods.merging import (
    ROUNDS,
    ClosedForm,
    add_up,
    join,
    moved_by,
    ties,
    trim,
    weighted_moment,
)

WIDTH, OUT = 12, 5


@pytest.fixture
def draw():
    """Random float64 tensors of any shape, the same for each test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def solve(rows, preserved=None, preserve_weight=1.0, ridge=1e-8):
    """Merge rows of (change, tokens (n, width), weight) of one layer; preserved: tokens."""
    sums = ClosedForm()
    for change, tokens, weight in rows:
        sums.add([("layer", change)], second_moment([tokens]), weight)
    moment = None if preserved is None else second_moment([preserved])
    merged, fit = sums.solve(moment, preserve_weight, ridge)
    return merged["layer"], fit


def test_the_closed_form_is_the_least_squares_solution(draw):
    """Each token is a line of a dense system; numpy's lstsq solves it for each output."""
    rows = [(draw(OUT, WIDTH), draw(n, WIDTH), weight) for n, weight in ((4, 1.0), (9, 2.0), (2, 0.5))]
    preserved, preserve_weight, ridge = draw(7, WIDTH), 0.3, 1e-3
    total = sum(weight for *_, weight in rows)
    lines = [(weight / len(tokens)) ** 0.5 * tokens for _, tokens, weight in rows]
    wanted = [line @ change.T for line, (change, *_) in zip(lines, rows, strict=True)]
    lines.append((preserve_weight * total / len(preserved)) ** 0.5 * preserved)
    mean = sum(weight * second_moment([tokens]) for _, tokens, weight in rows) / total
    lines.append((ridge * mean.trace() / WIDTH) ** 0.5 * torch.eye(WIDTH, dtype=torch.float64))
    wanted.append(torch.zeros(len(preserved) + WIDTH, OUT, dtype=torch.float64))
    dense = np.linalg.lstsq(torch.cat(lines).numpy(), torch.cat(wanted).numpy(), rcond=None)[0].T
    found, fit = solve(rows, preserved, preserve_weight, ridge)
    assert np.allclose(found.numpy(), dense, atol=1e-9)

    def energy(changes):
        parts = zip(changes, rows, strict=True)
        return sum(float(w * (tokens @ own.T).square().sum(1).mean()) for own, (_, tokens, w) in parts)

    own = energy([change for change, *_ in rows])
    assert fit.lost == pytest.approx((energy([found - change for change, *_ in rows]) / own) ** 0.5)
    moved = (preserved @ found.T).square().sum(1).mean()
    assert fit.moved == pytest.approx(float(moved * total / own) ** 0.5)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_weights_have_no_scale(draw, size):
    rows, preserved = [(draw(OUT, WIDTH), draw(6, WIDTH), 1.0) for _ in range(3)], draw(5, WIDTH)
    scaled = [(change, size * tokens, weight) for change, tokens, weight in rows]
    plain = solve(rows, preserved, 0.5, 1e-2)[0]
    assert torch.allclose(solve(scaled, size * preserved, 0.5, 1e-2)[0], plain)
    heavier = [(change, tokens, 7.0) for change, tokens, _ in rows]
    assert torch.allclose(solve(heavier, preserved, 0.5, 1e-2 * 7)[0], plain)


def test_the_ridge_weighs_the_same_against_one_row_of_many(draw):
    """Rows that don't meet: each comes out as it does alone, whatever their number."""
    basis = torch.linalg.qr(draw(WIDTH, WIDTH))[0]
    rows = [(draw(OUT, WIDTH), basis[:, 3 * n : 3 * n + 3].T, 1.0) for n in range(4)]
    together, alone = solve(rows, ridge=0.1)[0], [solve([row], ridge=0.1)[0] for row in rows]
    assert torch.allclose(together, sum(alone))


def test_one_change_merges_to_itself_on_its_tokens(draw):
    """As the ridge goes to 0: in the span of its tokens. Outside nothing is asked for, so nothing changes there."""
    change, tokens, outside = draw(OUT, WIDTH), draw(4, WIDTH), draw(3, WIDTH)
    found, fit = solve([(change, tokens, 1.0)])
    assert torch.allclose(found @ tokens.T, change @ tokens.T, atol=1e-5) and fit.lost < 1e-5
    basis = torch.linalg.qr(tokens.T)[0]
    assert torch.allclose(
        found @ (outside - outside @ basis @ basis.T).T, torch.zeros(()).double(), atol=1e-5
    )
    found, _ = solve([(change, draw(40, WIDTH), 1.0)])  # tokens that span everything
    assert torch.allclose(found, change, atol=1e-5)


def test_orthogonal_concepts_merge_exactly(draw):
    """Rows whose tokens are orthogonal to each other's don't meet, whatever their changes are elsewhere."""
    basis = torch.linalg.qr(draw(WIDTH, WIDTH))[0]
    parts = [draw(6, 3) @ basis[:, 3 * n : 3 * n + 3].T for n in range(3)]
    rows = [(draw(OUT, WIDTH), tokens, 1.0) for tokens in parts]
    preserved = draw(6, 3) @ basis[:, 9:].T
    found, fit = solve(rows, preserved)
    for change, tokens, _ in rows:
        assert torch.allclose(found @ tokens.T, change @ tokens.T, atol=1e-5)
    assert torch.allclose(found @ preserved.T, torch.zeros(()).double(), atol=1e-5)
    assert max(fit.lost, fit.moved) < 1e-5


def test_preserved_tokens_move_less_the_more_they_weigh(draw):
    """Where rows and preserved tokens disagree, what moves falls with the weight, to within 1 / weight of nothing."""
    rows, preserved = [(draw(OUT, WIDTH), draw(8, WIDTH), 1.0) for _ in range(3)], draw(6, WIDTH)
    fits = [solve(rows, preserved, weight, 1e-6)[1] for weight in (0.1, 1.0, 10.0, 1000.0)]
    assert [fit.moved for fit in fits] == sorted((fit.moved for fit in fits), reverse=True)
    assert [fit.lost for fit in fits] == sorted(fit.lost for fit in fits)
    assert fits[-1].moved < 1e-3 and fits[0].moved > 0.1


def shared(draw, preserved):
    """Three changes that leave `preserved` alone, as trainings in its null space make them."""
    layers = [torch.nn.Linear(WIDTH, OUT, bias=False, dtype=torch.float64) for _ in range(3)]
    changes = []
    for layer in layers:
        start, space = (
            layer.weight.detach().clone(),
            NullSpace([layer.weight], span(second_moment([preserved]), 1e-12)),
        )
        with torch.no_grad():
            layer.weight += draw(OUT, WIDTH)
        space.project()
        changes.append(layer.weight.detach() - start)
    return changes


def test_changes_in_one_null_space_leave_what_it_preserves_alone_summed_or_merged(draw):
    preserved = draw(6, WIDTH)
    changes = shared(draw, preserved)
    total = add_up([[("layer", change)] for change in changes])["layer"]
    assert torch.allclose(total @ preserved.T, torch.zeros(()).double(), atol=1e-12)
    rows = [(change, draw(2, WIDTH), 1.0) for change in changes]
    found, fit = solve(rows, preserved)
    # Six free dimensions hold the 3 x 2 tokens, so each row's own outputs are met; the sum adds the other rows' to them.
    for change, tokens, _ in rows:
        assert torch.allclose(found @ tokens.T, change @ tokens.T, atol=1e-3)
        assert not torch.allclose(total @ tokens.T, change @ tokens.T, atol=1e-1)
    assert fit.lost < 1e-3 and fit.moved < 1e-3


def test_one_change_in_the_null_space_of_what_is_preserved_merges_to_itself_at_any_weight(draw):
    preserved = draw(6, WIDTH)
    change, *_ = shared(draw, preserved)
    tokens = draw(6, WIDTH)
    for weight in (0.1, 10.0):
        found, _ = solve([(change, tokens, 1.0)], preserved, weight)
        both = torch.cat([preserved, tokens]).T
        assert torch.allclose(found @ both, change @ both, atol=1e-4)


def test_words_are_preserved_and_the_farthest_weighs_most(draw):
    """Against a dense computation of the same rounds, token by token."""
    rows, preserved, words = (
        [(draw(OUT, WIDTH), draw(8, WIDTH), 1.0) for _ in range(3)],
        draw(6, WIDTH),
        draw(9, 4, WIDTH),
    )

    def merged(words, rounds=ROUNDS):
        sums = ClosedForm()
        for change, tokens, weight in rows:
            sums.add([("layer", change)], second_moment([tokens]), weight)
        return sums.solve(second_moment([preserved]), 2.0, 1e-3, words)[0]["layer"]

    def moved(change):
        return (words @ change.T).square().sum(-1).mean(-1)

    moment = sum(tokens.T @ tokens / len(tokens) for _, tokens, _ in rows)
    wanted = sum(change @ (tokens.T @ tokens / len(tokens)) for change, tokens, _ in rows)
    shares = np.full(len(words), 1 / len(words))
    for number in range(ROUNDS + 1):
        own = sum(share * word.T @ word / len(word) for share, word in zip(shares, words, strict=True))
        kept = (preserved.T @ preserved / len(preserved) + own) / 2
        ridge = 1e-3 * float(moment.trace()) / len(rows) / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
        dense = wanted @ torch.linalg.inv(moment + 2.0 * len(rows) * kept + ridge)
        if number == 0:
            equal = dense
        shares = shares * moved(dense).sqrt().numpy()
        shares /= shares.sum()
    found = merged(words)
    assert torch.allclose(found, dense, atol=1e-9)
    assert moved(found).max() < moved(equal).max() < moved(merged(None)).max()


def test_the_words_sums_are_the_dense_ones_whatever_the_blocks(draw, monkeypatch):
    words, shares, change = draw(7, 3, WIDTH), torch.rand(7, dtype=torch.float64), draw(OUT, WIDTH)
    monkeypatch.setattr("concept_ablation.methods.merging.WORDS_AT_ONCE", 2)
    dense = sum(share * second_moment([word]) for share, word in zip(shares, words, strict=True))
    assert torch.allclose(weighted_moment(words, shares), dense)
    assert torch.allclose(moved_by(words, change.T @ change), (words @ change.T).square().sum(-1).mean(-1))


def test_a_reach_is_how_far_the_rows_tokens_move_along_their_own_changes(draw):
    rows = [(draw(OUT, WIDTH), draw(8, WIDTH), weight) for weight in (1.0, 2.0)]
    sums = ClosedForm()
    for change, tokens, weight in rows:
        sums.add([("layer", change)], second_moment([tokens]), weight)
    found = sums.solve(second_moment([draw(6, WIDTH)]), 2.0, 1e-3, reach=1.2)[0]["layer"]
    along = sum(w * float(((tokens @ found.T) * (tokens @ own.T)).sum(1).mean()) for own, tokens, w in rows)
    own = sum(w * float((tokens @ own.T).square().sum(1).mean()) for own, tokens, w in rows)
    assert along == pytest.approx(1.2 * own)


def test_a_sum_takes_a_tensor_that_a_change_lacks_as_unchanged():
    total = add_up([[("a", torch.ones(2))], [("a", torch.ones(2)), ("b", torch.ones(1))]])
    assert {name: value.tolist() for name, value in total.items()} == {"a": [2.0, 2.0], "b": [1.0]}


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_is_pefts(draw, density):
    from peft.utils.merge_utils import ties as pefts

    changes = [draw(OUT, WIDTH).float() for _ in range(5)]
    expected = pefts(changes, torch.ones(5), density)
    found = ties(lambda: ([("layer", change)] for change in changes), density)["layer"]
    assert torch.allclose(found.float(), expected, atol=1e-5)
    assert int((trim(changes[0], density) != 0).sum()) == int(density * OUT * WIDTH)


def test_no_read_tensor_is_changed(draw):
    """A file's tensors may be views of the file."""
    changes = [draw(OUT, WIDTH) for _ in range(2)]
    before = [change.clone() for change in changes]
    add_up([[("layer", change)] for change in changes])
    ties(lambda: ([("layer", change)] for change in changes), 0.5)
    solve([(change, draw(3, WIDTH), 1.0) for change in changes])
    assert all(map(torch.equal, changes, before))


def test_what_can_not_be_merged_is_told():
    with pytest.raises(ValueError, match="no rows"):
        ClosedForm().solve(None, 1.0, 1e-3)
    with pytest.raises(ValueError, match="text_encoder.token_embedding.7"):
        join([[("text_encoder.token_embedding.7", torch.ones(2))]] * 2)
