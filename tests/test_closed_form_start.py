"""`training.start: uce`: a training that begins at the closed form's edit, and what it still measures from the unchanged model."""

import pytest
import test_plan
import torch
from safetensors.torch import load_file
from test_bundles import CAT
from test_checkpoints import make_spec
from test_checkpoints import world as world  # noqa: PLC0414

from concept_ablation import load_pipeline
from concept_ablation.methods.ablation.stage import ablate_concept
from concept_ablation.methods.uce import METHOD
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.specs import build_plan

config = test_plan.config


def ablate(world, tmp_path, **changes):
    spec = make_spec(world, **{"prior_preservation": False, "lr_scheduler": "constant", **changes})
    spec |= {"neighbors": ["dog"], "preserve_prompts": []}
    ablate_concept(spec, world[1], tmp_path / "d.safetensors", tmp_path / "t.parquet", device="cpu")
    return load_file(tmp_path / "d.safetensors"), spec


def edited(world, spec):
    pipeline = load_pipeline(world[0], device="cpu")
    found, _ = METHOD.edit({**spec, "settings": {}}, pipeline)
    return found, {name: pipeline.unet.get_parameter(name.removeprefix("unet.")).detach() for name in found}


def test_before_the_first_step_it_is_the_closed_forms_edit(world, tmp_path):
    values, spec = ablate(world, tmp_path, start="uce", steps=0, preserve="none")
    whole, base = edited(world, spec)
    assert all(torch.allclose(values[name], whole[name], atol=1e-6) for name in whole)
    assert any(not torch.equal(values[name], base[name]) for name in base)


def test_what_is_preserved_stays_as_the_unchanged_model_gives_it(world, tmp_path):
    """The edit's part in the preserved span is taken out before the first step, too."""
    values, spec = ablate(world, tmp_path, start="uce", steps=0, preserve="null-space", preserve_tolerance=0.2)  # fmt: skip
    whole, base = edited(world, spec)
    moved = sum(float((values[name] - base[name]).norm()) for name in base)
    assert 0 < moved < 0.999 * sum(float((whole[name] - base[name]).norm()) for name in base)


def test_without_it_no_key_changes_and_with_it_one_that_knows_the_neighbors(config):
    (plain,) = build_plan([CAT], config).specs["ablate_concept"].values()
    assert "start" not in plain["training"]
    config["training"] |= {"start": "uce", "preserve": "none", "strength": "fixed"}
    (warm,) = build_plan([CAT], config).specs["ablate_concept"].values()
    assert warm["training"]["start"] == "uce" and warm["neighbors"] == ["weary cat", "crying cat"]


def test_other_groups_are_refused(config):
    config["training"] |= {"start": "uce", "preserve": "none", "strength": "fixed", "parameter_group": "attn"}
    with pytest.raises(PlanError, match=r"training.start uce edits keys and values .* is attn \(allowed with it: none\)"):  # fmt: skip
        build_plan([CAT], config)
