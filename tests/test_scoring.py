"""Scores of one row: hand-made features with known answers, then image stores through the real stage function."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_clip import make_tiny_clip

from concept_ablation.common.image_store import read_store, write_store
from concept_ablation.common.roles import PARAPHRASES, POOLS, WORST
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.evaluation import probes as scores
from concept_ablation.evaluation import scoring
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.copies import CopyNet
from concept_ablation.evaluation.memorized import MemorizationError
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.scoring import ScoreError, score_concept
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.registries import KINDS, METRICS

TARGET, ANCHOR, OWL, DUCK = "pouting cat", "cat", "owl", "duck"
WEARY = "weary cat"
AXES = {TARGET: 0, ANCHOR: 1, OWL: 2, DUCK: 3}
TEXTS = {subject: np.eye(5)[axis] for subject, axis in AXES.items()}


def score_probes(probes, texts=TEXTS, targets=(TARGET,), neighbors=(OWL, DUCK), kind="object", draws=20):
    """The long table's lines of a row made of these probes."""
    row = Row(KINDS[kind], targets, ANCHOR, neighbors, texts, probes)
    return scores.score_probes(row, Bootstrap(draws=draws))


def looks_like(*subjects):
    """Features of images, each nearest to one subject; a little noise so that no two images are equal."""
    rows = np.eye(5)[[(AXES | {WEARY: 4})[subject] for subject in subjects]]
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
    return score_probes(probes, draws=200)


def value(rows, role, metric, side, probe=None):
    found = [
        row
        for row in rows
        if (row["role"], row["metric"], row["side"]) == (role, metric, side) and probe in (None, row["probe"])
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
    result = score_probes(probes, texts, neighbors=())
    assert value(result, "target", "clip_accuracy", "base")["value"] == 0.5
    assert "as the same text" in caplog.text


def test_content_says_what_the_target_became(rows):
    """Among the anchor and the neighbors: 7 of 8 became the anchor; the one that stayed is nearest to whatever noise says."""
    after = value(rows, "target", "content", "ablated")
    assert after["value"] in (7 / 8, 1) and after["text"] == ANCHOR
    assert set(after["against"].split("; ")) == {OWL, DUCK}
    assert value(rows, "anchor", "content", "ablated")["value"] == 1
    assert not [
        row for row in rows if row["metric"] == "content" and row["role"] in ("neighbor", "neighbors")
    ]
    assert not [row for row in rows if row["metric"] == "neutral_share"]


def test_the_worst_neighbor_is_named_with_an_interval_that_holds_for_all(rows):
    """Owl lost two of four, duck nothing: owl's change, at the level 1 - 0.05 / 2."""
    worst = value(rows, "worst neighbor", "typical", "difference")
    own = value(rows, "neighbor", "typical", "difference", OWL)
    assert worst["probe"] == OWL and worst["value"] == own["value"] < 0
    assert worst["ci_low"] <= own["ci_low"] and worst["ci_high"] > own["ci_high"]
    assert worst["n"] == 4


def test_a_style_is_held_against_what_neutral_prompts_give():
    """5 of 8 of the target's images still show it, 1 of 4 neutral ones do."""
    probes = [
        Probe("target", TARGET, looks_like(*[TARGET] * 8), looks_like(*[TARGET] * 5, *[ANCHOR] * 3)),
        Probe("anchor", ANCHOR, looks_like(TARGET, *[ANCHOR] * 3), looks_like(*[ANCHOR] * 4)),
    ]
    rows = score_probes(probes, neighbors=(), kind="style")
    above = value(rows, "target", "above_neutral", "ablated")
    assert (above["value"], above["n"], above["interval"]) == (5 / 8 - 1 / 4, 8, "newcombe")
    alone = value(rows, "target", "clip_accuracy", "ablated")
    assert above["ci_high"] - above["ci_low"] > alone["ci_high"] - alone["ci_low"]


def test_paraphrases_are_scored_as_the_target_is_and_pooled_with_nothing():
    asked = PARAPHRASES.format(TARGET)
    probes = [
        Probe("target", TARGET, looks_like(*[TARGET] * 4), looks_like(*[ANCHOR] * 4)),
        Probe("paraphrase", asked, looks_like(*[TARGET] * 4), looks_like(*[TARGET] * 2, *[ANCHOR] * 2)),
        Probe("anchor", ANCHOR, looks_like(*[ANCHOR] * 4), looks_like(*[ANCHOR] * 4)),
    ]
    rows = score_probes(probes, neighbors=())
    assert value(rows, "target", "clip_accuracy", "ablated")["value"] == 0
    assert value(rows, "paraphrase", "clip_accuracy", "ablated")["value"] == 0.5
    assert value(rows, "paraphrase", "clip_cosine", "base")["text"] == TARGET
    assert {row["role"] for row in rows} == {"target", "paraphrase", "anchor"}


def test_content_needs_neighbors_to_choose_from():
    probes = [Probe("target", TARGET, looks_like(*[TARGET] * 4), looks_like(*[ANCHOR] * 4))]
    rows = score_probes(probes, neighbors=())
    assert "content" not in {row["metric"] for row in rows}


def test_an_anchor_that_falls_apart_is_not_typical():
    probes = [
        Probe("anchor", ANCHOR, looks_like(*[ANCHOR] * 20), looks_like(*[ANCHOR] * 10, *[DUCK] * 10)),
    ]
    rows = score_probes(probes)
    assert value(rows, "anchor", "typical", "base")["value"] >= 0.9
    assert value(rows, "anchor", "typical", "ablated")["value"] <= 0.5
    assert value(rows, "anchor", "typical", "difference")["interval"] == "redrawn-limit"


def test_a_target_is_typical_when_it_has_become_the_anchor():
    probes = [
        Probe("target", TARGET, looks_like(*[TARGET] * 30), looks_like(*[ANCHOR] * 20, *[OWL] * 10)),
        Probe("anchor", ANCHOR, looks_like(*[ANCHOR] * 20), looks_like(*[ANCHOR] * 20)),
    ]
    rows = score_probes(probes)
    assert value(rows, "target", "typical", "base")["value"] == 0
    after = value(rows, "target", "typical", "ablated")
    assert 0.5 < after["value"] <= 20 / 30
    assert (after["text"], after["against"]) == (ANCHOR, "base model, other seeds")


@pytest.fixture
def two_targets():
    """Two targets: one of them is gone, the other stays; 4 of the anchor's images look like one of the two."""
    texts = TEXTS | {WEARY: np.eye(5)[4]}
    probes = [
        Probe("target", TARGET, looks_like(*[TARGET] * 4), looks_like(*[ANCHOR] * 4)),
        Probe("target", WEARY, looks_like(*[WEARY] * 12), looks_like(*[WEARY] * 9, *[ANCHOR] * 3)),
        Probe(
            "anchor",
            ANCHOR,
            looks_like(TARGET, WEARY, WEARY, WEARY, *[ANCHOR] * 4),
            looks_like(*[ANCHOR] * 8),
        ),
        Probe("neighbor", OWL, looks_like(*[OWL] * 4), looks_like(*[OWL] * 4)),
    ]
    return lambda kind: score_probes(probes, texts, (TARGET, WEARY), (OWL,), kind)


def test_several_targets_have_their_own_rows_and_pooled_ones(two_targets):
    rows = two_targets("object")
    assert value(rows, "target", "clip_accuracy", "ablated", TARGET)["value"] == 0
    assert value(rows, "target", "clip_accuracy", "ablated", WEARY)["value"] == 9 / 12
    pooled = value(rows, "targets", "clip_accuracy", "ablated")
    assert (pooled["value"], pooled["n"], pooled["probe"], pooled["text"]) == (9 / 16, 16, "targets", "")
    assert value(rows, "targets", "clip_accuracy", "difference")["value"] == 9 / 16 - 1
    assert value(rows, "targets", "kid_x1000", "ablated")["n"] == 16
    recognition = value(rows, "target", "recognition", "base", TARGET)
    assert set(recognition["against"].split("; ")) == {WEARY, OWL}  # each target is a rival of the other


def test_the_anchor_is_held_against_all_targets(two_targets):
    anchor = value(two_targets("object"), "anchor", "clip_accuracy", "base")
    assert (anchor["value"], anchor["text"], anchor["against"]) == (4 / 8, f"{TARGET}; {WEARY}", ANCHOR)


def test_each_style_has_the_share_that_neutral_prompts_give_it(two_targets):
    rows = two_targets("style")
    pictures = looks_like(
        TARGET, WEARY, WEARY, WEARY, *[ANCHOR] * 4
    )  # the anchor's, as the base model draws them
    for target, axis in ((TARGET, 0), (WEARY, 4)):
        neutral = value(rows, "target", "neutral_share", "base", target)
        assert (neutral["value"], neutral["n"]) == (np.mean(pictures[:, axis] > pictures[:, 1]), 8)
        assert (neutral["text"], neutral["against"]) == (target, ANCHOR)
    assert "content" not in {row["metric"] for row in rows}


def test_one_target_is_not_pooled(rows):
    assert "targets" not in {row["role"] for row in rows}


def test_what_a_kind_measures_is_summarised_as_shares_or_means():
    zeros, ones = np.zeros(8), np.ones(8)
    measured = {"copy_rate": (ones, zeros), "copy_similarity": (0.9 * ones, np.linspace(0, 0.7, 8))}
    pictures = looks_like(*[TARGET] * 8)
    rows = score_probes([Probe("target", TARGET, pictures, pictures, (), measured)], kind="memorization")
    rate = value(rows, "target", "copy_rate", "difference")
    assert (rate["value"], rate["interval"]) == (-1, "bonett-price")
    similarity = value(rows, "target", "copy_similarity", "ablated")
    assert similarity["value"] == pytest.approx(0.35) and similarity["interval"] == "bootstrap"


def test_seeds_that_neighbors_share_are_redrawn_together():
    """Every neighbor loses likeness at the same seeds: the pooled interval must be as wide as one neighbor's, not narrower."""
    rng = np.random.default_rng(0)
    base = looks_like(*[OWL] * 24)
    after = base + rng.normal(0, 0.4, size=(24, 1)) * np.eye(5)[3]
    after /= np.linalg.norm(after, axis=1, keepdims=True)

    def width(*seeds):
        probes = [
            Probe("neighbor", name, base, after, one) for name, one in zip((OWL, DUCK), seeds, strict=True)
        ]
        rows = score_probes(probes, draws=2000)
        found = {role: value(rows, role, metric, "ablated", probe) for role, probe, metric in places}
        return found["neighbors"]["ci_high"] - found["neighbors"]["ci_low"], (
            found["neighbor"]["ci_high"] - found["neighbor"]["ci_low"]
        )

    shared, other = tuple(range(24)), tuple(range(100, 124))
    for metric in ("image_similarity", "kid_x1000"):
        places = [("neighbors", "neighbors", metric), ("neighbor", OWL, metric)]
        pooled, single = width(shared, shared)
        assert pooled == pytest.approx(single)
        pooled, single = width(shared, other)
        assert pooled == pytest.approx(single / np.sqrt(2), rel=0.1)


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


def score(spec, stores, out, images=None, **options):
    """The stage, with the base stores in the order in which they were made."""
    samples, bases = stores
    score_concept(spec, samples, list(bases.values()), out, images, **options)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def spec(clip_folder):
    return {
        "concept": "cat-1",
        "kind": "object",
        "targets": [TARGET],
        "anchor": ANCHOR,
        "neighbors": [OWL, DUCK],
        "samples": "pouting-cat.0123456789ab",
        "texts": {subject: f"a {subject}" for subject in AXES},
        "scorer": {"model": str(clip_folder), "pretrained": None},
        "statistics": {"bootstrap": 50, "confidence": 0.95, "seed": 0},
    }


def test_the_stage_writes_the_long_table(spec, stores, tmp_path):
    score(json.loads(json.dumps(spec)), stores, tmp_path / "out" / "scores.parquet")
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.schema.names == COLUMNS.names
    frame = table.to_pandas()
    assert set(frame.role) == {"target", "anchor", "neighbor", "neighbors", "worst neighbor"}
    other_kinds = {
        "copy_rate",
        "copy_similarity",
        "detected",
        "detector_score",
        "neutral_share",
        "above_neutral",
    }
    assert set(frame.metric) == set(METRICS) - other_kinds
    assert set(frame.side) == {"base", "ablated", "difference"} and set(frame.target) == {TARGET}
    assert set(frame.concept) == {"cat-1"} and set(frame.samples_key) == {"pouting-cat.0123456789ab"}
    assert frame.features.str.startswith("CLIP ").all() and frame.unit.notna().all()
    assert (frame.ci_low <= frame.value + 1e-12).all() and (frame.value <= frame.ci_high + 1e-12).all()
    assert frame[frame.role == "neighbors"].n.unique().tolist() == [8]
    assert set(frame.role[frame.pooled]) == {"neighbors", "worst neighbor"}
    counted = frame[~frame.pooled & (frame.metric == "typical") & (frame.side == "ablated")]
    assert counted.n.sum() == 16  # each of the row's images once
    target = frame[(frame.probe == TARGET) & (frame.metric == "clip_accuracy")]
    assert set(target.text) == {"a pouting cat"} and set(target.against) == {"a cat"}


def test_same_input_same_bytes(spec, stores, tmp_path):
    for name in ("one", "two"):
        score(spec, stores, tmp_path / f"{name}.parquet", device="cpu", batch_size=3)
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
    score(spec, stores, tmp_path / "scores.parquet", batch_size=2)
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
        score(spec, (samples, bases), tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def test_a_missing_probe_is_named(spec, stores, tmp_path):
    samples, bases = stores
    spec["neighbors"], bases["fox"] = ["fox"], bases.pop(OWL)
    del bases[DUCK]
    spec["texts"]["fox"] = "a fox"
    with pytest.raises(ScoreError, match="no images of 'fox'"):
        score(spec, (samples, bases), tmp_path / "scores.parquet")


def test_memorization_counts_copies_of_the_picture(spec, stores, tmp_path, caplog):
    """A red picture is memorized; a descriptor made at random still knows a picture from itself."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    digest = hashlib.sha256((tmp_path / "picture.png").read_bytes()).hexdigest()
    CopyNet(width=4, dim=8, image_size=16, threshold=1 - 1e-6).save(tmp_path / "copies")
    spec |= {"kind": "memorization", "image": {"file": str(tmp_path / "picture.png"), "sha256": digest}}
    spec |= {"descriptor": {"model": str(tmp_path / "copies"), "sha256": None, "fingerprint": "0" * 12}}
    score(spec, stores, tmp_path / "scores.parquet")
    frame = pq.read_table(tmp_path / "scores.parquet").to_pandas().set_index(["probe", "metric", "side"])
    assert frame.value[TARGET, "copy_rate", "base"] == 1 and frame.value[TARGET, "copy_rate", "ablated"] == 0
    assert frame.value[TARGET, "copy_rate", "difference"] == -1
    assert frame.value[ANCHOR, "copy_rate", "base"] == 0
    assert frame.value[TARGET, "copy_similarity", "base"] == pytest.approx(1)
    assert frame.features[TARGET, "copy_rate", "base"] == "copy descriptor copies"
    assert frame.against[TARGET, "copy_rate", "base"] == "the memorized picture"
    assert frame.features[TARGET, "clip_cosine", "base"].startswith("CLIP ")

    Image.new("RGB", (40, 30), "blue").save(tmp_path / "picture.png")
    with pytest.raises(MemorizationError, match="changed after this run was planned"):
        score(spec, stores, tmp_path / "again.parquet")
    (tmp_path / "picture.png").unlink()
    with pytest.raises(MemorizationError, match="picture.png: the memorized picture can't be read"):
        score(spec, stores, tmp_path / "again.parquet")


def test_unwanted_content_is_counted_by_the_row_s_detector(spec, stores, tmp_path):
    """The scorer is random, so the detector's texts decide nothing by themselves: its flags are compared with its own word."""
    spec |= {"kind": "inappropriate"}
    spec |= {
        "detector": {
            "type": "zero-shot",
            "scorer": None,
            "unsafe": ["a red thing"],
            "safe": ["a grey one", "sky"],
        }
    }
    score(spec, stores, tmp_path / "scores.parquet")
    frame = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    found = frame[frame.metric == "detected"]
    assert set(found.role) == {"target", "anchor", "neighbor", "neighbors"}
    assert set(found.features) == {
        frame.features[frame.metric == "recognition"].iloc[0].join(["zero-shot, ", ""])
    }
    single = found[found.role == "target"]
    assert set(single.text) == {"a red thing"} and set(single.against) == {"a grey one; sky"}
    scorer = ClipScorer(spec["scorer"]["model"])
    texts = scorer.text_features(["a red thing", "a grey one", "sky"])
    red, grey = (
        scorer.image_features([Image.new("RGB", (32, 32), colour)]) @ texts.T for colour in ("red", "grey")
    )
    expected = [float(row.argmax() == 0) for row in (red, grey)]
    assert single.set_index("side").value[["base", "ablated"]].tolist() == expected
    sure = frame[(frame.metric == "detector_score") & (frame.role == "target")].set_index("side").value
    scale = float(scorer.model.logit_scale.exp())
    certain = [np.exp(scale * row[0, 0]) / np.exp(scale * row).sum() for row in (red, grey)]
    assert sure[["base", "ablated"]].tolist() == pytest.approx(certain, rel=1e-4)


def test_several_targets_through_the_stage(spec, stores, tmp_path):
    spec |= {"targets": [TARGET, OWL], "neighbors": [DUCK]}
    samples, bases = stores
    rows = [
        row
        for role, subject in [("target", TARGET), ("target", OWL), ("anchor", ANCHOR), ("neighbor", DUCK)]
        for row in store_rows(role, subject, ["grey"] * 4)
    ]
    write_store(samples, rows, {})
    score_concept(
        spec, samples, [bases[name] for name in (TARGET, OWL, ANCHOR, DUCK)], tmp_path / "scores.parquet"
    )
    frame = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    assert set(frame.target) == {f"{TARGET}; {OWL}"}
    assert set(frame[frame.role == "target"].probe) == {TARGET, OWL}
    assert set(frame[frame.role == "targets"].n) == {8} and frame.pooled[frame.role == "targets"].all()
    anchor = frame[(frame.role == "anchor") & (frame.metric == "clip_accuracy")]
    assert set(anchor.text) == {"a pouting cat; a owl"}


def test_every_score_of_single_images_can_be_computed_from_the_record_of_images(spec, stores, tmp_path):
    """Shares and means, of each probe and of all neighbors pooled; KID compares sets and isn't in the record."""
    score(spec, stores, tmp_path / "scores.parquet", tmp_path / "images.parquet")
    images = pq.read_table(tmp_path / "images.parquet").to_pandas()
    scores = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    assert len(images) == 2 * 4 * 4 and set(images.nearest_text) <= set(spec["texts"])
    checked = set()
    for line in scores[scores.metric != "kid_x1000"].itertuples():
        role = "neighbor" if line.role in (POOLS["neighbor"], WORST) else line.role
        own = images[(images.role == role) & (line.role in POOLS.values() or images.subject == line.probe)]
        sides = {side: own[own.side == side][line.metric].to_numpy() for side in ("base", "ablated")}
        sides["difference"] = sides["ablated"] - sides["base"]
        assert sides[line.side].mean() == pytest.approx(line.value, abs=1e-9), line
        checked.add(line.metric)
    assert checked >= {"clip_accuracy", "recognition", "typical", "clip_cosine", "image_similarity"}


def test_the_record_says_where_each_picture_is(spec, stores, tmp_path):
    score(spec, stores, tmp_path / "scores.parquet", tmp_path / "images.parquet")
    files = {Path(path).stem: read_store(path) for path in stores[1].values()}
    files[spec["samples"]] = read_store(stores[0])
    for line in pq.read_table(tmp_path / "images.parquet").to_pylist():
        row = files[line["key"]].rows[line["position"]]
        assert (row["prompt"], row["seed"], row["subject"]) == (line["prompt"], line["seed"], line["subject"])
