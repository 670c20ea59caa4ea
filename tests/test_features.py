"""The scorer and the copy descriptor: shapes, norms, laziness, and errors that say what to do."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip
from torchvision import transforms

from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.copies import CopyDescriptor, CopyNet, copy_input, sscd_input
from concept_ablation.evaluation.features import FeatureError, batches

COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(clip_folder):
    return ClipScorer(clip_folder)


def pictures():
    return [Image.new("RGB", (40, 30), colour) for colour in COLOURS]


def test_clip_features_equal_open_clip_called_by_hand(scorer, clip_folder):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    model.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures()])).numpy()
        text = model.encode_text(tokenize(["a pouting cat", "a cat"])).numpy()
    expected_image = image / np.linalg.norm(image, axis=1, keepdims=True)
    expected_text = text / np.linalg.norm(text, axis=1, keepdims=True)
    np.testing.assert_allclose(scorer.image_features(pictures()), expected_image, atol=1e-5)
    np.testing.assert_allclose(scorer.text_features(["a pouting cat", "a cat"]), expected_text, atol=1e-5)


def test_features_do_not_depend_on_the_batch_size(scorer):
    all_at_once = scorer.image_features(pictures(), batch_size=64)
    assert all_at_once.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(all_at_once, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(scorer.image_features(pictures(), batch_size=2), all_at_once, atol=1e-5)


def test_images_are_read_a_batch_at_a_time():
    read = []
    source = (read.append(index) or index for index in range(10))
    first = next(batches(source, 4))
    assert first == [0, 1, 2, 3] and len(read) == 4
    with pytest.raises(ValueError, match="batch size 0"):
        next(batches([], 0))


def test_no_images_is_an_error_and_not_an_empty_score(scorer):
    with pytest.raises(ValueError, match="no images"):
        scorer.image_features([])


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("no/such/folder", None, "neither a folder nor an open_clip architecture"),
        ("ViT-B-32", None, "set `pretrained`"),
        ("ViT-B-32", "nobody", "not the name of published weights"),
    ],
)
def test_unknown_scorers_are_refused(model, pretrained, says):
    with pytest.raises(FeatureError, match=says):
        ClipScorer(model, pretrained)


def test_missing_published_weights_are_an_error_and_never_downloaded(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    with pytest.raises(FeatureError, match="not on this machine"):
        ClipScorer("ViT-B-32", "openai")


def test_damaged_folder_is_named(tmp_path):
    with pytest.raises(FeatureError, match="no open_clip_config.json"):
        ClipScorer(tmp_path)
    make_tiny_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FeatureError, match="can't be loaded"):
        ClipScorer(tmp_path)


def test_weights_of_a_named_architecture_from_a_file(tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-architecture.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-architecture.json")
    torch.save(open_clip.create_model("tiny-architecture").state_dict(), tmp_path / "weights.pt")
    scorer = ClipScorer("tiny-architecture", tmp_path / "weights.pt")
    assert scorer.name == "CLIP tiny-architecture (weights.pt)"
    assert scorer.text_features(["a cat"]).shape == (1, 8)


def test_copy_net_round_trip_and_size(tmp_path):
    net = CopyNet(threshold=0.7).eval()
    assert 1.1e6 < sum(parameter.numel() for parameter in net.parameters()) < 1.4e6
    descriptor = CopyDescriptor(net.save(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size < 2.6e6
    assert json.loads((tmp_path / "config.json").read_text())["threshold"] == descriptor.threshold == 0.7
    features = descriptor.features(pictures(), batch_size=2)
    with torch.no_grad():
        expected = net(torch.stack([copy_input(picture, 64) for picture in pictures()])).numpy()
    assert features.shape == (5, 128)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(features, expected, atol=5e-3)  # weights are stored in half precision


def test_copy_input_keeps_the_whole_picture_and_spans_minus_one_to_one():
    picture = Image.new("RGB", (200, 20), "white")
    picture.paste("black", (0, 0, 100, 20))
    pixels = copy_input(picture, 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels[:, :, 0].max() == -1 and pixels[:, :, -1].min() == 1


def test_is_copy_is_strictly_above_the_threshold(tmp_path):
    descriptor = CopyDescriptor(CopyNet(width=8, threshold=0.5).save(tmp_path))
    assert descriptor.is_copy(np.array([0.4, 0.5, 0.6])).tolist() == [False, False, True]


def test_missing_copy_descriptor_says_what_the_folder_needs(tmp_path):
    with pytest.raises(FeatureError, match="config.json is missing"):
        CopyDescriptor(tmp_path)
    CopyNet(width=8).save(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 16}')
    with pytest.raises(FeatureError, match="can't be read"):
        CopyDescriptor(tmp_path)


class MeanColour(torch.nn.Module):
    def forward(self, pixels):
        return pixels.mean(dim=(2, 3))


def torchscript(path):
    """A TorchScript file that is called as SSCD's are, and its SHA-256."""
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.script(MeanColour()).save(path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_torchscript_descriptor_is_fed_as_sscd_is(tmp_path):
    path, sha256 = torchscript(tmp_path / "sscd.pt")
    descriptor = CopyDescriptor(path, sha256=sha256.upper())
    assert descriptor.name == "copy descriptor sscd.pt"
    assert descriptor.is_copy(np.array([0.5, 0.51])).tolist() == [False, True]
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 288, 288)
    expected = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(colours).mean((2, 3))
    found = descriptor.features([Image.new("RGB", (40, 30), c) for c in ("#f00", "#0f0", "#00f")], 2)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-6)


def test_sscd_input_equals_torchvisions_resize_and_keeps_the_whole_picture():
    noise = np.random.default_rng(0).integers(0, 256, (100, 500, 3), dtype=np.uint8)
    published = transforms.Compose(
        [
            transforms.Resize([288, 288]),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    picture = Image.fromarray(noise)
    torch.testing.assert_close(sscd_input(picture), published(picture))


def test_a_torchscript_file_is_loaded_only_under_its_hash(tmp_path, monkeypatch):
    path, sha256 = torchscript(tmp_path / "sscd.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("was loaded"))
    with pytest.raises(FeatureError, match=f"holds code.* set it to {sha256}"):
        CopyDescriptor(path)
    with pytest.raises(FeatureError, match=f"SHA-256 is {sha256}, but {'0' * 64} is wanted"):
        CopyDescriptor(path, sha256="0" * 64)


def test_files_that_are_no_descriptor_are_named(tmp_path):
    with pytest.raises(
        FeatureError, match="is not there.*sscd_imagenet_mixup.torchscript.pt.*sscd-copy-detection"
    ):
        CopyDescriptor(tmp_path / "absent.pt", sha256="0" * 64)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    with pytest.raises(FeatureError, match="junk.pt is no TorchScript file"):
        CopyDescriptor(junk, sha256=hashlib.sha256(b"junk").hexdigest())
    CopyNet(width=8).save(tmp_path)
    with pytest.raises(FeatureError, match="is a folder: leave `sha256` null"):
        CopyDescriptor(tmp_path, sha256="0" * 64)
