"""Parameter group `embedding`: which rows of the token embedding train, and that nothing else does."""

import pytest
import torch
from test_training import DATA, SETTINGS, spec, weights
from tiny import make_tiny_pipeline

from concept_ablation.common.image_store import write_store
from concept_ablation.diffusion.delta import DeltaError, apply_delta, load_delta, save_delta
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.methods.ablation.conditioning import Encoder
from concept_ablation.methods.ablation.data import AnchorData
from concept_ablation.methods.ablation.settings import TrainingError
from concept_ablation.methods.ablation.stage import ablate_concept
from concept_ablation.methods.ablation.token_embeddings import TrainableTokenEmbeddings, target_tokens
from concept_ablation.methods.ablation.training import Training

SETTINGS = SETTINGS.__class__(**{**vars(SETTINGS), "group": "embedding"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture
def pipeline(folder):
    return load_pipeline(folder, device="cpu")


def ids(pipeline, words):
    """The token ids of words, as the tiny tokenizer makes them: one a letter, another one at a word's end."""
    return {i for word in words for i in pipeline.tokenizer(word, add_special_tokens=False).input_ids}


def embedding(pipeline):
    return pipeline.text_encoder.get_input_embeddings().weight.detach().clone()


def trainable(pipeline, tokens):
    return TrainableTokenEmbeddings(pipeline, {"text_encoder": tokens})


def train(pipeline, tokens, targets=None, **changes):
    settings = SETTINGS.__class__(**{**vars(SETTINGS), **changes})
    targets = targets or [(prompt.replace("cat", "pug"),) for prompt in DATA.prompts]
    return list(Training(pipeline, DATA, targets, settings, seed=0, tokens={"text_encoder": tokens}))


def test_every_token_of_every_target_trains_and_no_special_one(pipeline):
    found = target_tokens(pipeline.tokenizer, ["pug", "x y"], "cat")
    assert set(found) == ids(pipeline, ["pug", "x", "y"]) and len(found) == 5
    assert not set(found) & set(pipeline.tokenizer.all_special_ids)


def test_tokens_that_the_anchor_shares_stay_unless_there_are_no_others(pipeline):
    def tokens(targets, anchor):
        return set(target_tokens(pipeline.tokenizer, targets, anchor))

    assert tokens(["pug cat"], "cat") == ids(pipeline, ["pug"])
    assert tokens(["cat"], "pug cat") == ids(pipeline, ["cat"])
    assert tokens(["pug cat", "cat"], "cat") == ids(pipeline, ["pug", "cat"])


def test_a_target_without_a_token_is_refused(pipeline):
    with pytest.raises(TrainingError, match="the target ' ' has no token"):
        target_tokens(pipeline.tokenizer, ["pug", " "], "cat")


@pytest.mark.parametrize("loss", ["model-based", "noise-based"])
def test_only_the_targets_rows_move(pipeline, loss):
    before, unet = embedding(pipeline), weights(pipeline)
    tokens = target_tokens(pipeline.tokenizer, ["pug"], "cat")
    others = {n: v.clone() for n, v in pipeline.text_encoder.named_parameters()}
    train(pipeline, tokens, loss=loss, optimizer={**SETTINGS.optimizer, "weight_decay": 0.5})
    moved = (embedding(pipeline) != before).any(1).nonzero().flatten().tolist()
    assert moved == tokens
    assert all(torch.equal(value, unet[name]) for name, value in weights(pipeline).items())
    for name, value in pipeline.text_encoder.named_parameters():
        assert torch.equal(value, others[name]) or "token_embedding" in name


def test_the_text_encoder_runs_anew_in_each_step(pipeline):
    """With cached encodings of the target prompts the rows would have no gradient."""
    rows = trainable(pipeline, target_tokens(pipeline.tokenizer, ["pug"], "cat"))
    encoder = Encoder(pipeline, embeddings=rows)
    first, original = encoder.current_text(["a pug"]).hidden, encoder.text(["a pug"]).hidden
    assert first.requires_grad and torch.allclose(first, original, atol=1e-5)
    with torch.no_grad():
        for row in rows.parameters.values():
            row.neg_()
    assert not torch.allclose(encoder.current_text(["a pug"]).hidden, first, atol=1e-2)
    assert torch.equal(encoder.text(["a pug"]).hidden, original)
    fresh = Encoder(pipeline, embeddings=rows)
    assert torch.equal(fresh.text(["a pug"]).hidden, original)
    rows.write()
    with torch.no_grad():
        plain = pipeline.encode_prompt(["a pug"], "cpu", 1, False)[0]
    assert torch.equal(encoder.current_text(["a pug"]).hidden, plain)
    assert torch.equal(fresh.text(["a pug"]).hidden, original)


def test_the_gradient_is_that_of_the_whole_embedding_matrix(pipeline):
    tokens = target_tokens(pipeline.tokenizer, ["pug"], "cat")
    rows = trainable(pipeline, tokens)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    probe = torch.randn(77, 32, generator=torch.Generator().manual_seed(0))
    (Encoder(pipeline, embeddings=rows).current_text(["a red pug"]).hidden[0] * probe).sum().backward()
    weight.grad = None
    (pipeline.encode_prompt(["a red pug"], "cpu", 1, False)[0][0] * probe).sum().backward()
    for token, row in zip(tokens, rows.parameters.values(), strict=True):
        assert torch.allclose(row.grad, weight.grad[token], rtol=1e-4, atol=1e-5)
        assert row.grad.abs().max() > 0


@pytest.mark.parametrize("teacher", ["current", "frozen"])
def test_the_anchors_text_has_no_gradient_and_is_the_teachers(folder, teacher, monkeypatch):
    """All tokens shared with the anchor: its text moves with the rows, unless the teacher is frozen."""
    pipeline = load_pipeline(folder, device="cpu")
    original, calls, forward = embedding(pipeline), [], pipeline.unet.forward

    def spy(noisy, timesteps, text):
        calls.append((text.detach(), text.requires_grad))
        return forward(noisy, timesteps, text)

    monkeypatch.setattr(pipeline.unet, "forward", spy)
    tokens = sorted(ids(pipeline, ["cat"]))
    data = AnchorData([DATA.images[0]] * 4, ["a cat"] * 4)
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "teacher": teacher, "steps": 3, "learning_rate": 0.1})
    own = {"text_encoder": tokens}
    list(Training(pipeline, data, [("a big cat",)] * 4, settings, seed=0, tokens=own))
    assert [gradient for _, gradient in calls] == [False, True] * 3
    assert not torch.allclose(embedding(pipeline), original)
    same = torch.allclose(calls[4][0], calls[0][0], atol=1e-4)
    assert same == (teacher == "frozen")


def test_the_loss_falls(pipeline):
    tokens = target_tokens(pipeline.tokenizer, ["pug"], "cat")
    losses = [record.loss for record in train(pipeline, tokens, steps=15, learning_rate=0.1)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_no_tokens_is_an_error(pipeline):
    with pytest.raises(TrainingError, match="nothing to train"):
        train(pipeline, [])


def test_the_delta_holds_those_rows_and_puts_them_back(folder, tmp_path):
    rows = [
        {"image": p, "prompt": q, "seed": 0, "index": 0}
        for p, q in zip(DATA.images, DATA.prompts, strict=True)
    ]
    write_store(tmp_path / "a.parquet", rows, {})
    own = spec(folder)
    own["training"] = {**own["training"], "group": "embedding"}
    own["targets"] = ["owl", "fox"]
    ablate_concept(
        own, tmp_path / "a.parquet", tmp_path / "d.safetensors", tmp_path / "t.parquet", device="cpu"
    )

    pipeline = load_pipeline(folder, device="cpu")
    before, tokens = embedding(pipeline), sorted(ids(pipeline, ["owl", "fox"]))
    tensors, metadata = load_delta(tmp_path / "d.safetensors")
    assert set(tensors) == {f"text_encoder.token_embedding.{token}" for token in tokens}
    assert metadata["tokens"] == pipeline.tokenizer.convert_ids_to_tokens(tokens)
    assert (tmp_path / "d.safetensors").stat().st_size < 10_000
    apply_delta(pipeline, tmp_path / "d.safetensors")
    after = embedding(pipeline)
    assert (after != before).any(1).nonzero().flatten().tolist() == tokens
    for token in tokens:
        assert torch.equal(after[token], tensors[f"text_encoder.token_embedding.{token}"])


def test_rows_of_another_vocabulary_are_refused(pipeline, tmp_path):
    before = embedding(pipeline)
    for name, row in (("99999", torch.ones(32)), ("3", torch.ones(31)), ("x", torch.ones(32))):
        tensors = {
            "text_encoder.token_embedding.2": torch.ones(32),
            f"text_encoder.token_embedding.{name}": row,
        }
        save_delta(tmp_path / "d.safetensors", tensors, {"base_model": "sd"})
        with pytest.raises(DeltaError, match="1 of 2 parameters don't fit this model"):
            apply_delta(pipeline, tmp_path / "d.safetensors")
    assert torch.equal(embedding(pipeline), before)
