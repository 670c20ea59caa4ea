"""The search for prompts of a memorized picture: what it decides, when it stops, and what it leaves behind."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import make_tiny_pipeline

from concept_ablation.evaluation.copies import CopyNet
from concept_ablation.evaluation.memorized import CopyJudge, MemorizationError, without_copies
from concept_ablation.methods.ablation import prompt_search as memorization
from concept_ablation.methods.ablation.prompt_search import search_prompts
from concept_ablation.plan.concept import slug
from concept_ablation.prompts.templates import expand, read_templates

CONFIG = Path(__file__).parents[1] / "config"
CAPTION = "the midnight garden poster"
SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0, "eta": 0.0, "precision": "fp32"}
SAMPLER |= {"height": None, "width": None}


class Descriptor:
    """Red pictures are copies of red pictures: the cosine of mean colours."""

    name, threshold = "colours", 0.9

    def __init__(self, model, device="cpu", sha256=None):
        pass

    def features(self, images, batch_size=64):
        colours = np.stack([np.asarray(image.convert("RGB"), float).mean((0, 1)) for image in images])
        return colours / np.linalg.norm(colours, axis=1, keepdims=True)

    def is_copy(self, similarity):
        return np.asarray(similarity) > self.threshold


@pytest.fixture
def world(monkeypatch):
    """A model that brings the picture back in the given share of images; `drawn` lists what it drew."""
    rates, drawn = {}, []

    def sample_images(pipeline, prompts, seeds, **options):
        for prompt, seed in zip(prompts, seeds, strict=True):
            drawn.append((prompt, seed))
            yield Image.new("RGB", (8, 8), "red" if seed - 100 < 10 * rates.get(prompt, 0) else "blue")

    monkeypatch.setattr("concept_ablation.evaluation.memorized.CopyDescriptor", Descriptor)
    monkeypatch.setattr(memorization, "load_model", lambda *arguments: None)
    monkeypatch.setattr(memorization, "sample_images", sample_images)
    return rates, drawn


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(file)
    return {
        "kind": "memorization",
        "targets": [CAPTION],
        "anchor": "moon",
        "image": {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "descriptor": {"model": "colours", "sha256": None},
        "model": {"path": "model", "revision": None},
        "sampler": SAMPLER,
        "file": "prompts.txt",
        "candidates": ["a print", "a moon", "half a print", "a picture of a moon", "a poster", "a night"],
        "images": 10,
        "seed": 100,
        "anchors_wanted": 2,
        "targets_wanted": 2,
        "anchor_max": 0.3,
        "target_min": 0.6,
        "budget": 40,
    }


def search(spec, folder, **options):
    search_prompts(spec, folder / "found.json", folder / "tried.parquet", device="cpu", **options)
    return json.loads((folder / "found.json").read_text()), pq.read_table(
        folder / "tried.parquet"
    ).to_pylist()


def test_images_decide_what_a_prompt_is_and_the_search_stops_when_it_has_enough(world, spec, tmp_path):
    rates, drawn = world
    rates |= {CAPTION: 1.0, "a print": 0.6, "a moon": 0.3, "half a print": 0.5}
    found, tried = search(spec, tmp_path)
    assert found == {
        "kind": "memorization",
        "anchor": "moon",
        "prompts": ["a moon", "a picture of a moon"],
        "target_prompts": [CAPTION, "a print"],
    }
    assert [(row["prompt"], row["decision"], row["copies"], row["copy_rate"]) for row in tried] == [
        (CAPTION, "target", 10, 1.0),
        ("a print", "target", 6, 0.6),
        ("a moon", "anchor", 3, 0.3),
        ("half a print", "neither", 5, 0.5),
        ("a picture of a moon", "anchor", 0, 0.0),
    ]
    assert [row["caption"] for row in tried] == [True, False, False, False, False]
    assert tried[2]["max_similarity"] == pytest.approx(1) and tried[2]["mean_similarity"] == pytest.approx(
        0.3
    )
    assert len(drawn) == 50 and drawn[10:20] == [("a print", 100 + index) for index in range(10)]
    metadata = json.loads(pq.read_schema(tmp_path / "tried.parquet").metadata[b"concept_ablation"])
    assert metadata["seed"] == 100 and metadata["threshold"] == 0.9


def test_candidates_of_a_language_model_come_last_and_none_twice(world, spec, tmp_path):
    world[0].update({CAPTION: 1.0, "the print": 0.9})
    (tmp_path / "written.json").write_text(json.dumps({"prompts": ["a moon", "the print"]}))
    spec |= {"candidates": ["a moon", "a night"]}
    found, tried = search(spec, tmp_path, candidates=tmp_path / "written.json")
    assert [row["prompt"] for row in tried] == [CAPTION, "a moon", "a night", "the print"]
    assert found["target_prompts"] == [CAPTION, "the print"]


def test_a_caption_that_does_not_bring_the_picture_back_is_an_error_at_once(world, spec, tmp_path):
    world[0][CAPTION] = 0.2
    with pytest.raises(MemorizationError, match=r"in 2 of 10 images: the model hasn't memorized it"):
        search(spec, tmp_path)
    assert len(pq.read_table(tmp_path / "tried.parquet")) == 1 and len(world[1]) == 10
    assert not (tmp_path / "found.json").exists()


def test_one_of_two_captions_may_be_forgotten(world, spec, tmp_path):
    world[0].update({"second": 1.0, "a print": 1.0})
    found, _ = search({**spec, "targets": ["first", "second"]}, tmp_path)
    assert found["target_prompts"] == ["second", "a print"] and "first" not in found["prompts"]


@pytest.mark.parametrize(
    ("changes", "rates", "says"),
    [
        (
            {},
            {},
            r"2 of 2 anchor prompts and 1 of 2 target prompts after 7 .*all candidates were tried.*lower target_min",
        ),
        (
            {"budget": 2},
            {"a print": 1.0},
            r"0 of 2 anchor prompts and 2 of 2 .* after 2 .*raise the budget \(2\)",
        ),
        (
            {"candidates": ["a print"]},
            {"a print": 0.4},
            r"add prompts to prompts.txt.*raise anchor_max \(0.3\) and lower",
        ),
    ],
)
def test_too_few_prompts_are_an_honest_failure_with_a_record(world, spec, tmp_path, changes, rates, says):
    world[0].update({CAPTION: 1.0, **rates})
    with pytest.raises(MemorizationError, match=says) as raised:
        search({**spec, **changes}, tmp_path)
    assert str(tmp_path / "tried.parquet") in str(raised.value)
    assert len(pq.read_table(tmp_path / "tried.parquet")) in (2, 7)


def test_the_record_is_written_when_sampling_breaks(world, spec, tmp_path, monkeypatch):
    def broken(pipeline, prompts, seeds, **options):
        yield from (Image.new("RGB", (8, 8), "red") for _ in range(15))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(memorization, "sample_images", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        search(spec, tmp_path)
    assert pq.read_table(tmp_path / "tried.parquet").column("prompt").to_pylist() == [CAPTION]


def test_a_picture_that_is_not_as_planned_is_refused_before_anything_is_drawn(world, spec, tmp_path):
    file = tmp_path / "picture.png"
    image = spec["image"]
    file.write_bytes(b"no picture")
    with pytest.raises(MemorizationError, match="was changed after this run was planned"):
        search(spec, tmp_path)
    image["sha256"] = hashlib.sha256(b"no picture").hexdigest()
    with pytest.raises(MemorizationError, match="is no picture that can be read"):
        search(spec, tmp_path)
    file.unlink()
    with pytest.raises(MemorizationError, match="picture.png: the memorized picture can't be read"):
        search(spec, tmp_path)
    with pytest.raises(MemorizationError, match="anchor_max 0.6 must be below target_min 0.6"):
        search({**spec, "anchor_max": 0.6}, tmp_path)
    assert not world[1]


def test_images_of_a_prompt_do_not_depend_on_the_batch(spec, tmp_path):
    """The real sampler and descriptor: what was tried, and how similar it is, for two batch sizes."""
    model = make_tiny_pipeline(tmp_path / "model", size=32)
    descriptor = CopyNet(width=8, dim=8, threshold=-2).save(tmp_path / "copies")
    spec |= {"model": {"path": str(model), "revision": None}, "images": 3, "candidates": ["a", "b"]}
    spec |= {"descriptor": {"model": str(descriptor), "sha256": None, "fingerprint": "0"}}
    records = []
    for batch_size in (2, 7):
        with pytest.raises(MemorizationError, match="0 of 2 anchor prompts and 2 of 2 target"):
            search(spec, tmp_path, batch_size=batch_size)
        records.append(pq.read_table(tmp_path / "tried.parquet").to_pylist())
    assert (
        [row["prompt"] for row in records[0]] == [row["prompt"] for row in records[1]] == [CAPTION, "a", "b"]
    )
    for one, other in zip(*records, strict=True):
        assert one["mean_similarity"] == pytest.approx(other["mean_similarity"], abs=1e-3)


def rows(colours):
    for place, colour in enumerate(colours):
        yield {"image": Image.new("RGB", (8, 8), colour), "seed": 5 + place, "index": place}


def test_copies_among_the_anchor_images_make_room_for_the_next_seeds(world, spec, caplog):
    judge = CopyJudge(spec["image"], spec["descriptor"])
    left = rows(["blue", "red", "blue", "red", "blue", "blue", "blue", "blue"])
    kept, dropped = without_copies(left, 4, judge)
    assert [(row["seed"], row["index"]) for row in kept] == [(5, 0), (7, 1), (9, 2), (10, 3)] and dropped == 2
    assert "2 anchor images are copies" in caplog.text
    assert without_copies(rows(["blue"] * 4), 2, judge)[1] == 0


def test_too_many_copies_among_the_anchor_images_are_a_warning_and_then_an_error(world, spec, caplog):
    judge = CopyJudge(spec["image"], spec["descriptor"])
    kept, dropped = without_copies(rows(["red"] * 6 + ["blue"] * 2), 4, judge)
    assert (len(kept), dropped) == (2, 6) and "2 of 4 anchor images are left" in caplog.text
    with pytest.raises(MemorizationError, match="7 of 8 anchor images are copies .* only 1 of 4 are left"):
        without_copies(rows(["red"] * 7 + ["blue"]), 4, judge)


def test_the_shipped_prompts_name_the_caption_and_what_it_shows():
    slots = {"caption": [CAPTION], "anchor": ["moon"], "colour": ["red", "blue"]}
    prompts = expand(read_templates(CONFIG / "prompts/memorization.txt"), "moon", slots)
    near = [prompt for prompt in prompts if CAPTION in prompt]
    assert len(near) >= 3 and sum("moon" in prompt for prompt in prompts) >= 8
    assert expand(read_templates(CONFIG / "prompts/eval/caption.txt"), CAPTION, {}) == [CAPTION]
    others = expand(read_templates(CONFIG / "prompts/eval/memorization.txt"), CAPTION, {})
    assert CAPTION not in others and len(set(others) - {*near[:2]}) >= 3
    assert Image.open(CONFIG / f"memorized/{slug(CAPTION)}.png").size == (128, 128)
