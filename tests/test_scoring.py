"""Scores of one row: hand-made features with known answers, then image stores through the real stage function."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_clip import make_tiny_clip

from concept_ablation import scoring, tables
from concept_ablation.features import ClipScorer
from concept_ablation.imagestore import write_store
from concept_ablation.scoring import Bootstrap, Probe, ScoreError, score_concept, score_probes

TARGET, ANCHOR, OWL, DUCK = "pouting cat", "cat", "owl", "duck"
AXES = {TARGET: 0, ANCHOR: 1, OWL: 2, DUCK: 3}
TEXTS = {subject: np.eye(4)[axis] for subject, axis in AXES.items()}


def looks_like(*subjects):
    """Features of images, each nearest to one subject; a little noise so that no two images are equal."""
    rows = np.eye(4)[[AXES[subject] for subject in subjects]]
    rows = rows + np.random.default_rng(len(subjects)).normal(0, 0.05, size=rows.shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def rows():
    """8 of 8 target images become the anchor but one; an owl turns into a duck, another into the anchor."""
    probes = [
        Probe("target", TARGET, looks_like(*[TARGET] * 8), looks_like(TARGET, *[ANCHOR] * 7)),
        Probe("anchor", ANCHOR, looks_like(TARGET, *[ANCHOR] * 3), looks_like(*[ANCHOR] * 4)),
        Probe("neighbor", OWL, looks_like(*[OWL] * 4), looks_like(DUCK, ANCHOR, OWL, OWL)),
        Probe("neighbor", DUCK, looks_like(*[DUCK] * 6), looks_like(*[DUCK] * 6)),
    ]
    return score_probes(probes, TEXTS, TARGET, ANCHOR, Bootstrap(draws=200))


def value(rows, role, metric, model, probe=None):
    found = [
        row
        for row in rows
        if (row["role"], row["metric"], row["model"]) == (role, metric, model)
        and probe in (None, row["probe"])
    ]
    assert len(found) == 1
    return found[0]


def test_target_accuracy_falls(rows):
    assert value(rows, "target", "clip_accuracy", "base")["value"] == 1
    after = value(rows, "target", "clip_accuracy", "ablated")
    assert (after["value"], after["n"], after["interval"]) == (1 / 8, 8, "wilson")
    assert value(rows, "target", "clip_accuracy", "difference")["value"] == -7 / 8


def test_anchor_accuracy_counts_images_that_look_like_the_target(rows):
    assert value(rows, "anchor", "clip_accuracy", "base")["value"] == 1 / 4
    assert value(rows, "anchor", "clip_accuracy", "base")["text"] == TARGET
    assert value(rows, "anchor", "clip_accuracy", "ablated")["value"] == 0
    assert value(rows, "anchor", "clip_cosine", "ablated")["text"] == ANCHOR
    assert not [row for row in rows if row["role"] == "anchor" and row["metric"] == "recognition"]


def test_recognition_is_among_the_specific_subjects_and_accuracy_against_the_anchor(rows):
    owl = value(rows, "neighbor", "recognition", "ablated", OWL)
    assert set(owl["against"].split("; ")) == {TARGET, DUCK}
    # the image that became a duck is lost; the one that became the plain anchor is an even draw of what noise is left
    assert owl["value"] in (0.5, 0.75)
    assert (
        value(rows, "neighbor", "clip_accuracy", "ablated", OWL)["value"] <= 0.75
    )  # the anchor image is seen here


def test_pooled_neighbors_weigh_every_image_alike(rows):
    parts = [value(rows, "neighbor", "recognition", "ablated", name) for name in (OWL, DUCK)]
    pooled = value(rows, "neighbors", "recognition", "ablated")
    assert pooled["n"] == 10
    assert pooled["value"] == pytest.approx(sum(part["value"] * part["n"] for part in parts) / 10)
    change = value(rows, "neighbors", "recognition", "difference")
    assert change["value"] == pytest.approx(
        pooled["value"] - value(rows, "neighbors", "recognition", "base")["value"]
    )
    assert change["interval"] == "bonett-price" and change["ci_low"] < change["value"] < change["ci_high"]


def test_both_clip_scores_have_names_that_say_which(rows):
    cosine = value(rows, "target", "clip_cosine", "base")["value"]
    assert 0.9 < cosine <= 1
    assert value(rows, "target", "clip_score_2_5", "base")["value"] == pytest.approx(2.5 * cosine)


def test_kid_and_similarity_say_how_far_the_images_moved(rows):
    assert value(rows, "neighbor", "kid_x1000", "ablated", DUCK)["value"] == pytest.approx(0, abs=1e-9)
    assert value(rows, "neighbor", "image_similarity", "ablated", DUCK)["value"] == pytest.approx(1)
    assert value(rows, "target", "kid_x1000", "ablated")["value"] > 1000
    assert value(rows, "target", "image_similarity", "ablated")["value"] < 0.3


def test_equal_texts_are_undecided_and_said(caplog):
    texts = TEXTS | {ANCHOR: TEXTS[TARGET]}
    probes = [Probe("target", TARGET, looks_like(*[TARGET] * 4), looks_like(*[OWL] * 4))]
    result = score_probes(probes, texts, TARGET, ANCHOR, Bootstrap(draws=20))
    assert value(result, "target", "clip_accuracy", "base")["value"] == 0.5
    assert "as the same text" in caplog.text


# --- the stage, on image stores ---------------------------------------------------------------------------

COLOURS = {TARGET: "red", ANCHOR: "grey", OWL: "green", DUCK: "blue"}


def store_rows(role, subject, colours, seed=100):
    for index, colour in enumerate(colours):
        image = Image.new("RGB", (32, 32), colour)
        prompt = f"a {subject}" if index % 2 else f"a picture of a {subject}"
        yield {
            "image": image,
            "prompt": prompt,
            "seed": seed + index,
            "index": index,
            "role": role,
            "subject": subject,
        }


@pytest.fixture
def stores(tmp_path):
    probes = [("target", TARGET), ("anchor", ANCHOR), ("neighbor", OWL), ("neighbor", DUCK)]
    after = COLOURS | {TARGET: "grey"}
    rows = [row for role, subject in probes for row in store_rows(role, subject, [after[subject]] * 4)]
    write_store(tmp_path / "samples.parquet", rows, {})
    bases = {}
    for _, subject in probes:
        bases[subject] = tmp_path / f"{subject}.parquet"
        write_store(bases[subject], store_rows(None, subject, [COLOURS[subject]] * 4), {})
    return tmp_path / "samples.parquet", bases


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def spec(clip_folder):
    return {
        "concept": "cat-1",
        "kind": "object",
        "target": TARGET,
        "anchor": ANCHOR,
        "neighbors": [OWL, DUCK],
        "samples": "pouting-cat.0123456789ab",
        "texts": {subject: f"a {subject}" for subject in AXES},
        "scorer": {"model": str(clip_folder), "pretrained": None},
        "statistics": {"bootstrap": 50, "confidence": 0.95, "seed": 0},
    }


def test_the_stage_writes_the_long_table(spec, stores, tmp_path):
    score_concept(json.loads(json.dumps(spec)), *stores, tmp_path / "out" / "scores.parquet")
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.schema.names == tables.COLUMNS.names
    frame = table.to_pandas()
    assert set(frame.role) == {"target", "anchor", "neighbor", "neighbors"}
    assert set(frame.metric) == set(tables.UNITS) and set(frame.model) == {"base", "ablated", "difference"}
    assert set(frame.concept) == {"cat-1"} and set(frame.key) == {"pouting-cat.0123456789ab"}
    assert frame.features.str.startswith("CLIP ").all() and frame.unit.notna().all()
    assert (frame.ci_low <= frame.value + 1e-12).all() and (frame.value <= frame.ci_high + 1e-12).all()
    assert frame[frame.role == "neighbors"].n.unique().tolist() == [8]
    target = frame[(frame.probe == TARGET) & (frame.metric == "clip_accuracy")]
    assert set(target.text) == {"a pouting cat"} and set(target.against) == {"a cat"}


def test_same_input_same_bytes_and_base_stores_in_order_do_too(spec, stores, tmp_path):
    samples, bases = stores
    score_concept(spec, samples, bases, tmp_path / "one.parquet", {"device": "cpu", "score_batch_size": 3})
    score_concept(
        spec,
        samples,
        list(bases.values()),
        tmp_path / "two.parquet",
        {"device": "cpu", "score_batch_size": 3},
    )
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_never_more_than_a_batch_of_images_is_decoded(spec, stores, tmp_path, monkeypatch):
    alive, most = 0, 0

    class CountingScorer(ClipScorer):
        def image_features(self, images, batch_size):
            def counted():
                nonlocal alive, most
                for image in images:
                    alive += 1
                    most = max(most, alive)
                    yield image

            def encode(batch):
                nonlocal alive
                alive -= len(batch)
                return encode_image(batch)

            encode_image, self.model.encode_image = self.model.encode_image, encode
            try:
                return super().image_features(counted(), batch_size)
            finally:
                self.model.encode_image = encode_image

    monkeypatch.setattr(scoring, "ClipScorer", CountingScorer)
    score_concept(spec, *stores, tmp_path / "scores.parquet", {"score_batch_size": 2})
    assert most == 2


@pytest.mark.parametrize("fault", ["seed", "count", "swapped"])
def test_images_of_other_seeds_are_not_compared(spec, stores, tmp_path, fault):
    samples, bases = stores
    if fault == "seed":
        write_store(bases[OWL], store_rows(None, OWL, ["green"] * 4, seed=7), {})
    elif fault == "count":
        write_store(bases[OWL], store_rows(None, OWL, ["green"] * 3), {})
    else:
        bases[OWL], bases[DUCK] = bases[DUCK], bases[OWL]
    with pytest.raises(ScoreError, match="same prompts and seeds"):
        score_concept(spec, samples, bases, tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def test_a_missing_probe_is_named(spec, stores, tmp_path):
    samples, bases = stores
    spec["neighbors"], bases["fox"] = ["fox"], bases[OWL]
    spec["texts"]["fox"] = "a fox"
    with pytest.raises(ScoreError, match="no images of 'fox'"):
        score_concept(spec, samples, bases, tmp_path / "scores.parquet")
