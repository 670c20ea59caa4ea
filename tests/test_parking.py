"""Text encoders that are on a GPU only while they encode."""

import pytest
import torch
from tiny_families import make_tiny_flux, make_tiny_sd3

from concept_ablation.diffusion import parking
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.token_embeddings import TrainableTokenEmbeddings

MAKE = {"sd3": (make_tiny_sd3, "text_encoder_3"), "flux": (make_tiny_flux, "text_encoder_2")}


class Moves:
    """Where each encoder was sent, instead of going there: this machine needs no GPU."""

    def __init__(self, monkeypatch):
        self.made = []
        real = torch.nn.Module.to

        def to(module, *where, **named):
            if where and torch.device(where[0]).type in ("cuda", "cpu") and hasattr(module, "own_name"):
                self.made.append((module.own_name, torch.device(where[0]).type))
                return module
            return real(module, *where, **named)

        monkeypatch.setattr(torch.nn.Module, "to", to)


@pytest.fixture(params=MAKE)
def pipeline(request, tmp_path):
    make, parked = MAKE[request.param]
    loaded = load_pipeline(make(tmp_path / "model"), device="cpu")
    for name, part in loaded.components.items():
        if isinstance(part, torch.nn.Module):
            part.own_name = name
    loaded.parked = parked
    return loaded


def test_t5_is_on_the_gpu_only_while_it_encodes(pipeline, monkeypatch):
    family = family_of(pipeline)
    before = family.encode_prompts(pipeline, ["an owl"])
    moves = Moves(monkeypatch)
    parking.place(pipeline, torch.device("cuda"))
    others = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert set(moves.made) == {(name, "cuda") for name in others - {pipeline.parked}}
    moves.made.clear()
    after = family.encode_prompts(pipeline, ["an owl"])
    assert moves.made == [(pipeline.parked, "cuda"), (pipeline.parked, "cpu")]
    assert torch.equal(before.hidden, after.hidden) and torch.equal(before.pooled, after.pooled)


def test_it_stays_where_a_gradient_has_to_reach_it(pipeline, monkeypatch):
    moves = Moves(monkeypatch)
    parking.place(pipeline, torch.device("cuda"))
    moves.made.clear()
    TrainableTokenEmbeddings(pipeline, {pipeline.parked: [3]})
    assert (pipeline.parked, pipeline.device.type) in moves.made
    moves.made.clear()
    family_of(pipeline).encode_prompts(pipeline, ["an owl"])
    assert not moves.made


def test_on_a_cpu_nothing_moves(pipeline, monkeypatch):
    parking.place(pipeline, torch.device("cpu"))
    moves = Moves(monkeypatch)
    family_of(pipeline).encode_prompts(pipeline, ["an owl"])
    assert not moves.made
