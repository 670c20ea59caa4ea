"""Detectors: zero-shot by an independent formula, NudeNet by a stand-in for its package."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip

from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.detectors import (
    DetectorError,
    NudeNetDetector,
    ZeroShotDetector,
    load_detector,
)

COLOURS = ("red", "green", "blue", "white", "black", "orange")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return ClipScorer(make_tiny_clip(tmp_path_factory.mktemp("clip")))


def pictures():
    return (Image.new("RGB", (40, 20), colour) for colour in COLOURS)


def test_zero_shot_flags_where_an_unsafe_text_is_nearest(scorer):
    unsafe, safe = ["an angry face", "a fight"], ["a flower", "a quiet sea", "a cake"]
    detector = load_detector({"type": "zero-shot", "scorer": None, "unsafe": unsafe, "safe": safe}, scorer)
    images, texts = scorer.image_features(pictures()), scorer.text_features(unsafe + safe)
    logits = np.exp(float(scorer.model.logit_scale.detach())) * images.astype(np.float64) @ texts.T
    np.testing.assert_array_equal(
        detector.look(pictures()).flags, [float(row.argmax() < 2) for row in logits]
    )
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(detector.look(pictures(), 2).scores, softmax[:, :2].sum(1), rtol=1e-5)
    assert detector.name == f"zero-shot, {scorer.name}"
    assert (detector.text, detector.against) == ("an angry face; a fight", "a flower; a quiet sea; a cake")


def test_zero_shot_may_have_its_own_clip_model(scorer, tmp_path):
    own = {"model": str(make_tiny_clip(tmp_path / "other", seed=1)), "pretrained": None}
    spec = {"type": "zero-shot", "scorer": own, "unsafe": ["a"], "safe": ["b"]}
    detector = load_detector(spec, scorer)
    assert detector.name == "zero-shot, CLIP other"
    assert not np.allclose(detector.texts, ZeroShotDetector(scorer, ["a"], ["b"]).texts)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"type": "q16"}, "unknown type 'q16' .allowed: zero-shot, nudenet"),
        ({"type": "zero-shot", "unsafe": [], "safe": ["b"]}, "at least one text under 'unsafe'"),
        ({"type": "zero-shot", "unsafe": ["a", "b"], "safe": ["b"]}, "'b' stands under both"),
        ({"type": "nudenet", "labels": ["FACE"], "threshold": 0.5}, "no label FACE .allowed: FEMALE_BREAST"),
        ({"type": "nudenet", "labels": [], "threshold": 0.5}, "needs labels"),
        ({"type": "nudenet", "labels": ["FACE_MALE"], "threshold": 1.5}, "threshold 1.5 .allowed: above 0"),
    ],
)
def test_mistakes_are_named(spec, says, scorer):
    with pytest.raises(DetectorError, match=says):
        load_detector(spec, scorer)


class Colours:
    """A scorer for which a text is a colour's name and a picture its own mean colour."""

    name, model = "colours", types.SimpleNamespace(logit_scale=torch.tensor(1.0))

    def text_features(self, texts):
        return np.eye(3)[[("red", "green", "blue").index(text) for text in texts]]

    def image_features(self, images, batch_size=64):
        colours = np.array([np.asarray(image).mean((0, 1)) for image in images])
        return colours / np.linalg.norm(colours, axis=1, keepdims=True)


def test_any_unsafe_text_flags_what_is_nearest_to_it_and_the_safe_ones_nothing():
    """Red, green, blue, orange (nearer to red) and cyan, as near to the safe blue as to the unsafe green."""
    drawn = [Image.new("RGB", (4, 4), colour) for colour in (*COLOURS[:3], "orange", "cyan")]
    detector = ZeroShotDetector(Colours(), unsafe=["red", "green"], safe=["blue"])
    assert detector.look(drawn).flags.tolist() == [1, 1, 0, 1, 0.5]
    assert ZeroShotDetector(Colours(), ["blue"], ["red", "green"]).look(drawn).flags.tolist() == [
        0,
        0,
        1,
        0,
        0.5,
    ]
    assert ZeroShotDetector(Colours(), ["red"], ["green"]).look(drawn[3:4]).flags.tolist() == [1]
    alone, both = (ZeroShotDetector(Colours(), unsafe, ["blue"]) for unsafe in (["red"], ["red", "green"]))
    assert (both.look(drawn[:2]).scores > alone.look(drawn[:2]).scores).all() and alone.look(drawn).scores[
        0
    ] > 0.5


class StandIn:
    """Finds a breast in red pictures, a face in all; wants blue first, as OpenCV reads files."""

    def detect(self, pixels):
        assert pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"] and pixels.shape == (20, 40, 3)
        found = [{"class": "FACE_FEMALE", "score": 0.9, "box": [0, 0, 1, 1]}]
        red = pixels[0, 0, 2] == 255 and not pixels[0, 0, :2].any()
        if red:
            found += [
                {"class": "FEMALE_BREAST_EXPOSED", "score": score, "box": [0, 0, 1, 1]}
                for score in (0.3, 0.6)
            ]
        return found


@pytest.fixture
def nudenet(monkeypatch):
    module = types.ModuleType("nudenet")
    module.NudeDetector = StandIn
    monkeypatch.setitem(sys.modules, "nudenet", module)


def test_nudenet_flags_its_labels_from_the_threshold_on(nudenet):
    labels = ["FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED"]
    detector = load_detector({"type": "nudenet", "labels": labels, "threshold": 0.6})
    assert detector.look(pictures()).scores.tolist() == [0.6, 0, 0, 0, 0, 0]
    assert detector.look(pictures()).flags.tolist() == [1, 0, 0, 0, 0, 0]
    assert NudeNetDetector(labels, 0.61).look(pictures()).flags.sum() == 0
    assert NudeNetDetector(["FACE_FEMALE"], 0.5).look(pictures()).flags.tolist() == [1] * 6
    assert detector.name.startswith("NudeNet ") and detector.name.endswith("score >= 0.6")
    assert detector.text == "FEMALE_BREAST_EXPOSED; BUTTOCKS_EXPOSED"


def test_nudenet_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(DetectorError, match=r"pip install 'concept-ablation\[nudenet\]'"):
        NudeNetDetector()


def test_planning_needs_no_torch():
    import subprocess

    code = "import sys, concept_ablation.evaluation.detectors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
