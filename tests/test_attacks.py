"""Attacks that are learned: what they change and what not, that their tokens are real ones, and that what they learned can be replayed."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from concept_ablation.__main__ import main
from concept_ablation.common.image_store import read_store, write_store
from concept_ablation.common.roles import MARK
from concept_ablation.diffusion.delta import save_delta
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.diffusion.placeholders import add_placeholders, filled, placed
from concept_ablation.evaluation.attacks.base import AttackError, Goal, load_learned
from concept_ablation.evaluation.attacks.prefix import nearest, typable
from concept_ablation.evaluation.attacks.stage import attack_concept, replay
from concept_ablation.evaluation.presence import PresenceJudge, family_line
from concept_ablation.evaluation.statistics import proportion
from concept_ablation.registries import ATTACKS
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip

SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0, "eta": 0.0, "precision": "fp32"}
SAMPLER |= {"height": None, "width": None}
BUDGET = {"tokens": 2, "steps": 12, "batch_size": 4, "learning_rate": 0.3, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny pipeline, a tiny CLIP, a delta and pictures of two subjects."""
    made = tmp_path_factory.mktemp("attacks")
    make_tiny_pipeline(made / "pipeline", size=32)
    make_tiny_clip(made / "clip")
    generator = np.random.default_rng(0)
    for name in ("x", "y"):
        pixels = generator.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
        rows = [
            {"image": Image.fromarray(one), "prompt": f"a {name}", "seed": number, "index": number}
            for number, one in enumerate(pixels)
        ]
        write_store(made / f"{name}.parquet", rows, {})
    pipeline = load_pipeline(made / "pipeline", device="cpu")
    parameters = family_of(pipeline).trainable_parameters(pipeline.unet, "cross-attn")
    changed = {f"unet.{name}": value + 0.1 for name, value in parameters.items()}
    save_delta(made / "delta.safetensors", changed, {"group": "cross-attn"})
    return made


@pytest.fixture
def goal(folder):
    pictures = list(read_store(folder / "x.parquet").images())
    prompts = [f"a {MARK}", f"my {MARK}", f"one {MARK}"]
    return Goal(load_pipeline(folder / "pipeline", device="cpu"), pictures, prompts, "fp32", seed=3)


def state(pipeline):
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return [value.clone() for part in parts for value in part.state_dict().values()]


def test_a_placeholder_with_a_words_embedding_says_that_word(goal):
    pipeline = goal.pipeline
    table = goal.tables()["text_encoder"]
    ids = goal.tokens("x y")["text_encoder"]
    rows = table[torch.tensor(ids)].clone().requires_grad_()
    text = add_placeholders(pipeline, len(ids))
    with filled(pipeline, {"text_encoder": rows}):
        found = family_of(pipeline).encode_prompts(pipeline, [placed(f"a {MARK}", text)]).hidden
    assert torch.equal(found, family_of(pipeline).encode_prompts(pipeline, ["a x y"]).hidden)
    found.sum().backward()
    assert rows.grad.abs().sum() > 0
    assert (
        placed("A <LEARNED>, my <learned>", "cat") == "A cat, my cat"
        and placed(f"{MARK} a dog", "") == "a dog"
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_lowers_the_loss_and_leaves_the_model_as_it_is(goal, name):
    before = state(goal.pipeline)
    fixed = goal.draw(32, torch.Generator().manual_seed(7))
    start = goal.tables()["text_encoder"][torch.tensor(goal.tokens("q")["text_encoder"] * 2)]
    learned = ATTACKS[name].learn(goal, "q", BUDGET | {"steps": 40, "learning_rate": 2.0})
    with torch.no_grad():
        assert goal.loss(learned.rows, fixed) < goal.loss({"text_encoder": start}, fixed)
    assert len(learned.losses) == 40
    assert all(torch.equal(old, new) for old, new in zip(before, state(goal.pipeline), strict=True))


def test_an_attack_is_the_same_with_the_same_seed(folder, goal):
    again = Goal(goal.pipeline, goal.pictures, goal.prompts, "fp32", seed=3)
    first, second = (ATTACKS["soft-prompt"].learn(one, "q", BUDGET) for one in (goal, again))
    assert torch.equal(first.rows["text_encoder"], second.rows["text_encoder"])


def test_a_prefix_is_made_of_words_that_can_be_typed(goal):
    learned = ATTACKS["prefix"].learn(goal, "q", BUDGET)
    tokenizer, table = goal.pipeline.tokenizer, goal.tables()["text_encoder"]
    ids = tokenizer(learned.words, add_special_tokens=False).input_ids
    assert len(ids) == BUDGET["tokens"] and set(ids) <= set(typable(tokenizer, len(table)))
    assert torch.equal(learned.rows["text_encoder"], table[ids])
    assert not set(typable(tokenizer, len(table))) & set(tokenizer.all_special_ids)


def test_the_nearest_word_is_that_of_the_largest_cosine():
    words = torch.nn.functional.normalize(
        torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    points = 3 * words[[7, 31]] + 0.01
    assert nearest(points, words).tolist() == [7, 31]


def test_no_attack_starts_from_words_without_a_token(goal):
    with pytest.raises(AttackError, match="no token"):
        ATTACKS["soft-prompt"].learn(goal, " ", BUDGET)


def spec_of(folder, name):
    soft = name == "soft-prompt"
    prompts = {
        "ablated": f"a {MARK}" if soft else f"{MARK} a x",
        "control": f"a {MARK}" if soft else f"{MARK} a y",
    }
    aims = {side: {"start": side, "prompts": [[prompt]]} for side, prompt in prompts.items()}
    return {
        "model": {"path": str(folder / "pipeline"), "revision": None},
        "sampler": SAMPLER,
        "kind": "object",
        "targets": ["x"],
        "anchor": "y",
        "texts": {"x": "a x", "y": "a y"},
        "scorer": {"model": str(folder / "clip"), "pretrained": None},
        "confidence": 0.9,
        "attack": name,
        "settings": BUDGET,
        "aims": aims,
        "plain": [["a x"]],
        "images": 5,
        "seed": 1000,
    }


def test_a_picture_counts_if_it_is_nearer_to_the_target_and_as_near_as_the_unchanged_models_own(folder):
    spec = spec_of(folder, "prefix")
    shown, neutral = read_store(folder / "x.parquet"), read_store(folder / "y.parquet")
    plain, judge = PresenceJudge(spec), PresenceJudge(spec, "cpu", [shown], neutral)

    def cosines(store, text):
        scorer = judge.models.scorer
        return scorer.image_features(store.images(), 4) @ scorer.text_features([text])[0]

    floor = (np.median(cosines(shown, "a x")) + np.median(cosines(neutral, "a x"))) / 2
    assert judge.floors == {"x": pytest.approx(floor, abs=1e-6)} and plain.floors == {}
    for store in (shown, neutral):
        nearer, near = (
            cosines(store, "a x") > cosines(store, "a y"),
            cosines(store, "a x") >= judge.floors["x"],
        )
        assert plain.seen(store).tolist() == nearer.tolist(), "without such pictures the texts alone decide"
        assert judge.seen(store).tolist() == (nearer & near).tolist()
    high = PresenceJudge({**spec, "floors": {"x": 2.0}})
    assert not high.seen(shown).any(), "a floor that was written down holds, as a replay needs it"


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_judged_on_three_sides_and_can_be_replayed(folder, tmp_path, name, capsys):
    spec = spec_of(folder, name)
    outputs = {
        "scores": tmp_path / "a.parquet",
        "images": tmp_path / "a.images.parquet",
        "learned": tmp_path / "a.safetensors",
    }
    sources = {"pictures": [folder / "x.parquet"], "control": folder / "y.parquet"}
    attack_concept(spec, folder / "delta.safetensors", **sources, **outputs, device="cpu", batch_size=5)
    (line,) = pq.read_table(outputs["scores"]).to_pylist()
    shown, neutral = [read_store(folder / "x.parquet")], read_store(folder / "y.parquet")
    store, judge = read_store(outputs["images"]), PresenceJudge(spec, "cpu", shown, neutral)
    for side in ("base", "ablated", "control"):
        seen = judge.seen(store.select(side))
        assert len(seen) == 5 and line[side] == np.mean(seen) and line[f"{side}_seen"] == seen.tolist()
        assert store.select(side).column("seed") == [1000, 1001, 1002, 1003, 1004]
    assert (line["family"], line["n"], line["budget"]) == (name, 5, "2 tokens, 12 steps of 4 pictures")
    learned, about = load_learned(outputs["learned"])
    assert (
        json.loads(json.dumps(spec | {"floors": judge.floors})) == about and line["learned"] == learned.words
    )

    again = replay(
        outputs["learned"],
        folder / "delta.safetensors",
        tmp_path / "again.parquet",
        device="cpu",
        batch_size=5,
    )
    assert again["ablated_seen"] == line["ablated_seen"], "on the same model the same"
    drawn, before = read_store(tmp_path / "again.parquet"), store.select("ablated")
    assert drawn.column("prompt") == before.column("prompt")
    differ = [
        np.abs(np.subtract(*map(np.int16, map(np.asarray, two)))).max()
        for two in zip(drawn.images(), before.images(), strict=True)
    ]
    assert max(differ) <= 1

    assert main(["replay", str(outputs["learned"]), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert name in said and "5 images" in said and "unchanged model" in said


def test_what_is_no_attack_is_refused(folder, tmp_path, capsys):
    with pytest.raises(AttackError, match="no such file"):
        load_learned(tmp_path / "none.safetensors")
    with pytest.raises(AttackError, match="not what an attack learned"):
        load_learned(folder / "delta.safetensors")
    assert main(["replay", str(folder / "delta.safetensors")]) == 2
    assert "not what an attack learned" in capsys.readouterr().err


def test_the_interval_of_the_worst_of_several_is_bonferronis():
    seen = {"ablated": np.array([1.0, 0, 0, 0, 0, 0]), "base": np.ones(6)}
    line = family_line("typo", seen, 0.95, 5)
    expected = proportion(seen["ablated"], confidence=0.99)
    assert (line["worst_low"], line["worst_high"]) == (expected.low, expected.high)
    assert line["ablated_high"] < line["worst_high"] and "control" not in line
