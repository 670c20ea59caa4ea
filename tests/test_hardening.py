"""Hardening: a training that is attacked as it goes, what it then moves, what it leaves as it was, and where it is refused."""

import dataclasses

import pytest
import test_plan
import torch
from safetensors.torch import load_file
from test_bundles import BOTH, CAT, INK
from test_checkpoints import Judge, Killed, ablate, assert_equal, kill_at, make_spec
from test_checkpoints import world as world  # noqa: PLC0414
from test_training import DATA, SETTINGS, TARGETS, weights
from test_training import folder as folder  # noqa: PLC0414
from test_training import pipeline as pipeline  # noqa: PLC0414

from concept_ablation.common.roles import MARK
from concept_ablation.diffusion.delta import read_metadata
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.methods.ablation import stage as module
from concept_ablation.methods.ablation.hardening import Hardening, joined
from concept_ablation.methods.ablation.training import Training
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.specs import build_plan

config = test_plan.config
SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0, "eta": 0.0, "precision": "fp32"}
SAMPLER |= {"height": None, "width": None}
HARDEN = {"every": 2, "tokens": 2, "steps": 3, "batch_size": 2, "learning_rate": 1.0, "images": 3, "seed": 9}
HARDEN |= {"sampler": SAMPLER}
OPEN = [(text.replace("cat", MARK),) for text in DATA.prompts]


def hardened(pipeline, **changes):
    asked = {"owl": ["an owl", "two owls"], "fox": ["a fox"]}
    hardening = Hardening(pipeline, HARDEN | changes.pop("harden", {}), asked, OPEN, "fp32")
    preserved = changes.pop("preserved", ())
    settings = dataclasses.replace(SETTINGS, **changes)
    return Training(pipeline, DATA, TARGETS, settings, seed=0, preserved=preserved, hardening=hardening)


def encoded(pipeline, training):
    """The text encoding of all prompts that name what the first attack found, by transformers alone: (prompts, tokens, width)."""
    rows = training.state()["found"]["text_encoder"][: HARDEN["tokens"]]
    encoder, tokenizer, found = pipeline.text_encoder, pipeline.tokenizer, []

    def put(module, inputs, output):
        return torch.cat((output[:, :place], rows[None], output[:, place + 2 :]), 1)

    hook = encoder.get_input_embeddings().register_forward_hook(put)
    for (text,) in OPEN:
        ids = tokenizer(text.replace(MARK, " qq "), padding="max_length", max_length=77).input_ids
        place = ids.index(tokenizer("qq", add_special_tokens=False).input_ids[0])
        found.append(encoder(torch.tensor([ids]))[0].detach())
    hook.remove()
    return torch.cat(found)


def test_attacks_come_after_every_k_steps_and_targets_take_turns(pipeline, monkeypatch):
    seen, attack = [], Hardening.attack

    def told(self, step, parameters):
        seen.append((step, list(self.goals)[(step // 2 - 1) % 2]))
        return attack(self, step, parameters)

    monkeypatch.setattr(Hardening, "attack", told)
    records = list(hardened(pipeline, steps=6))
    assert seen == [(2, "owl"), (4, "fox")], "none before the first step, none after the last"
    assert len(records) == 6


def test_an_attack_changes_no_weight_and_leaves_no_gradient(pipeline):
    training = hardened(pipeline)
    before, parameters = weights(pipeline), list(training.parameters.values())
    found = training.hardening.attack(2, parameters)
    assert found["text_encoder"].shape == (2, 32)
    assert all(torch.equal(before[name], value) for name, value in weights(pipeline).items())
    assert all(value.grad is None and value.requires_grad for value in parameters)
    again = training.hardening.attack(2, parameters)
    assert torch.equal(found["text_encoder"], again["text_encoder"]), "the draws depend on the step alone"


def test_what_is_found_is_trained_on_against_the_formula(pipeline, monkeypatch):
    """|| eps(x, c(v)) - eps(x, c) ||^2 of the prompts that name v, and its gradient."""
    training = hardened(pipeline, steps=3, batch_size=4, max_grad_norm=None, learning_rate=1e-30)
    monkeypatch.setattr("concept_ablation.methods.ablation.draws.FOUND", 1.0)
    calls, forward = [], pipeline.unet.forward

    def spy(noisy, timesteps, text):
        calls.append((noisy, timesteps, text))
        return forward(noisy, timesteps, text)

    steps = iter(training)
    next(steps), next(steps)
    found = joined({}, training.hardening.attack(2, list(training.parameters.values())))
    monkeypatch.setattr(Hardening, "attack", lambda *_: found)
    monkeypatch.setattr(pipeline.unet, "forward", spy)
    record = next(steps)
    (noisy, timesteps, anchor), (same, _, target) = calls
    assert torch.equal(noisy, same)
    wanted = encoded(pipeline, training)
    for own in target:
        assert (wanted - own).abs().amax((1, 2)).min() < 1e-5, "one of the open prompts, with what was found"
    parameters = list(training.parameters.values())
    with torch.no_grad():
        goal = forward(noisy, timesteps, anchor).sample
    with FAMILY.detach_bos(pipeline.unet):
        loss = (forward(noisy, timesteps, target).sample - goal).square().sum((1, 2, 3)).mean() / 16
    gradient = torch.autograd.grad(loss, parameters)
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    norm = torch.stack([one.norm() for one in gradient]).norm()
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_half_of_the_prompts_name_what_was_found_and_only_then(pipeline):
    training = hardened(pipeline, steps=3, batch_size=4)
    assert not any(
        "learned" in prompt for _ in range(20) for prompt in training._draws.next_batch().target.prompts
    )
    list(training)
    prompts = [prompt for _ in range(100) for prompt in training._draws.next_batch().target.prompts]
    named = [prompt for prompt in prompts if "<learned0> <learned1>" in prompt]
    assert 0.4 < len(named) / len(prompts) < 0.6
    assert {"a red <learned0> <learned1>", "two <learned0> <learned1>s"} <= set(named)


def test_what_is_preserved_stays_exact(pipeline):
    """The null space holds for what attacks found, too."""
    preserved = ["a dog"]
    training = hardened(pipeline, steps=5, preserve="null-space", preserve_tolerance=0.2, preserved=preserved)
    before = weights(pipeline)
    list(training)
    basis, moved = training.null_space.basis, 0.0
    for name, value in pipeline.unet.named_parameters():
        change = (value - before[name]).detach()
        if change.abs().sum() > 0:
            assert float((change @ basis).norm()) <= 1e-5 * float(change.norm())
            moved += float(change.norm())
    assert moved > 0


def specs(world, **changes):
    own = make_spec(world, **{"steps": 5, **changes})
    return own, {**own, "harden": HARDEN}


def test_until_the_first_attack_and_without_one_nothing_differs(world, tmp_path):
    plain, own = specs(world)
    wanted, found = ablate(world, tmp_path / "plain", plain), ablate(world, tmp_path / "hard", own)
    assert found[1][:2] == wanted[1][:2] and found[1][2] != wanted[1][2]
    assert "harden" not in read_metadata(tmp_path / "plain" / "delta.safetensors")
    assert read_metadata(tmp_path / "hard" / "delta.safetensors")["harden"] == HARDEN
    never = {**own, "harden": HARDEN | {"every": 50}}
    assert_equal(ablate(world, tmp_path / "never", never), wanted)


@pytest.mark.parametrize("kills", [(2,), (3,), (4, 5)])
def test_a_killed_one_ends_as_one_that_was_not(world, tmp_path, monkeypatch, kills):
    _, own = specs(world)
    expected = ablate(world, tmp_path / "whole", own, steps=0)
    kill_at(monkeypatch, *kills)
    for _ in kills:
        with pytest.raises(Killed):
            ablate(world, tmp_path, own, steps=1)
    assert_equal(ablate(world, tmp_path, own, steps=1), expected)


def test_every_rung_of_a_search_is_attacked_anew_with_the_same_pictures(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Validation", Judge)
    seen, attack = [], Hardening.attack
    monkeypatch.setattr(Hardening, "attack", lambda self, step, p: seen.append((id(self), step)) or attack(self, step, p))  # fmt: skip
    ladder = [{"learning_rate": 1e-4}, {"learning_rate": 2e-4}]
    _, own = specs(world, preserve="none")
    own |= {"search": {"looks": [], "scales": [1.0], "ladder": ladder}, "validation": {"alpha": 0.05}}
    ablate(world, tmp_path, own)
    assert [step for _, step in seen] == [2, 4, 2, 4] and len({one for one, _ in seen}) == 1
    monkeypatch.setattr(Hardening, "attack", attack)
    wanted = load_file(tmp_path / "delta.safetensors")
    own["search"]["ladder"] = ladder[1:]
    ablate(world, tmp_path, own)
    assert all(
        torch.equal(value, wanted[name]) for name, value in load_file(tmp_path / "delta.safetensors").items()
    )


def test_off_no_key_changes_and_on_it_is_looked_at_after_the_last_step(config):
    (plain,) = build_plan([CAT], config).specs["ablate_concept"].values()
    assert "harden" not in plain and "harden" not in plain["training"]
    assert plain["search"]["looks"] == [20]
    hard = dataclasses.replace(CAT, overrides={"training.harden.every": 10})
    (spec,) = build_plan([hard], config).specs["ablate_concept"].values()
    assert spec["harden"]["every"] == 10 and spec["harden"]["sampler"] == config["anchors"]["sampler"]
    assert spec["search"]["looks"] == [] and spec["training"] == plain["training"] | {
        "preserve_tolerance": 1e-2
    }
    assert "preserve_tolerance" not in spec["harden"]


def test_a_hardened_training_preserves_at_least_so_loosely(config):
    config["training"]["harden"] |= {"every": 10, "preserve_tolerance": 0.02}
    config["training"]["search"]["ladder"] = [{}, {"preserve_tolerance": 0.005}, {"preserve_tolerance": 0.1}]
    (cat,), (ink,) = (build_plan([row], config).specs["ablate_concept"].values() for row in (CAT, INK))
    assert (cat["training"]["preserve_tolerance"], ink["training"]["preserve_tolerance"]) == (0.02, 0.03)
    assert cat["search"]["ladder"] == [{}, {"preserve_tolerance": 0.02}, {"preserve_tolerance": 0.1}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.name": "uce"}, r"harden attacks a training of method ablation, and this row's method is uce \(allowed with it"),
        ({"training.steps": 10}, r"harden.every is 10, so none of 10 steps comes after an attack \(allowed: 0, which is off, to 9\)"),
        ({"training.parameter_group": "embedding", "training.preserve": "none", "training.strength": "fixed"},
         r"learns token embeddings .* \(allowed with hardening: cross-attn, attn, full-weight\)"),
    ],
)  # fmt: skip
def test_where_it_does_nothing_it_is_refused(config, changes, message):
    row = dataclasses.replace(CAT, overrides={"training.harden.every": 10, **changes})
    with pytest.raises(PlanError, match=message):
        build_plan([row], config)


def test_a_bundle_that_trains_refuses_hardened_rows_and_one_that_merges_takes_them(config):
    config["training"]["harden"]["every"] = 10
    assert build_plan(BOTH, config).specs["merge_deltas"]
    config["bundles"]["how"] = "joint"
    with pytest.raises(PlanError, match=r"how joint attacks no model, and this row is hardened \(allowed: "):
        build_plan(BOTH, config)
