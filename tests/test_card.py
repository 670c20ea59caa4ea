"""The model card: complete, escaped, its head valid, its snippet running; nothing is sent unless asked."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from tiny import make_tiny_pipeline

from concept_ablation.common.image_store import write_store
from concept_ablation.diffusion.delta import apply_delta, save_delta, token_row_name
from concept_ablation.diffusion.pipeline import load_pipeline
from concept_ablation.report.card import CardError, card_of_results, escape, is_hub_id, push

HOSTILE = "ow|l\n# <script>`x`</script> [a](b) {{ 7*7 }}"
MODEL = {"path": "tiny", "revision": None, "fingerprint": "f"}
SAMPLER = {"steps": 2}


def pictures(probe, colour):
    for index in range(probe["images"]):
        image = Image.new("RGB", (300, 200), colour)
        yield {
            "image": image,
            "prompt": "a picture",
            "seed": index,
            "index": index,
            "role": probe.get("role"),
        } | {"subject": probe["subject"]}


def make_results(folder, *, target="owl", kind="object", base_model="tiny", tensors=None, targets=None):
    """A finished run's files, as far as a card reads them."""
    results = folder / "results"
    probes = [
        {"role": role, "subject": subject, "prompts": ["a picture"], "images": 8, "seed": 0}
        for role, subject in [
            *(("target", t) for t in targets or [target]),
            ("anchor", "bird"),
            ("neighbor", "hen"),
        ]
    ]
    after = (row for probe in probes for row in pictures(probe, "blue"))
    write_store(
        results / "samples" / "k.parquet",
        after,
        {"model": MODEL, "sampler": SAMPLER, "probes": probes, "stage": "s"},
    )
    for number, probe in enumerate(probes):
        plain = {name: value for name, value in probe.items() if name != "role"}
        for steps in (2, 3):  # another sampler's pictures aren't this run's
            metadata = {"model": MODEL, "sampler": {"steps": steps}, "probe": plain}
            colour = "red" if steps == 2 else "green"
            write_store(results / "base" / f"{number}-{steps}.parquet", pictures(plain, colour), metadata)
    delta = results / "concepts" / "k" / "delta.safetensors"
    metadata = {"base_model": base_model, "base_revision": None, "kind": kind, "targets": targets or [target]}
    settings = {"settings": {"steps": 80, "note": HOSTILE}, "seed": 3, "group": "cross-attn"}
    save_delta(delta, tensors or {"unet.a": torch.ones(1)}, metadata | settings | {"anchor": "bird"})
    words = {"concept": "row", "kind": kind, "target": target, "anchor": "bird"}
    summary = words | {
        "neighbors": ["hen", "duck"],
        "verdict": "removed, neighbors kept",
        "firmness": "provisional",
    }
    lines = [
        words
        | {
            "probe": target,
            "role": "target",
            "metric": metric,
            "side": side,
            "value": value,
            "ci_low": value - 0.1,
        }
        | {"ci_high": value + 0.1, "n": 8, "unit": unit, "features": "CLIP tiny", "samples_key": "k"}
        for metric, unit in (("clip_accuracy", "share of images"), ("clip_cosine", "cosine"))
        for side, value in (("base", 0.9), ("ablated", 0.1), ("difference", -0.8))
    ]
    (results / "report").mkdir()
    pq.write_table(pa.Table.from_pylist(lines), results / "report" / "scores.parquet")
    summary |= {"delta": "elsewhere/results/concepts/k/delta.safetensors"}
    pq.write_table(pa.Table.from_pylist([summary]), results / "report" / "summary.parquet")
    return results


def read(card):
    """A card's head, as data, and its text."""
    _, head, text = (card / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_card_tells_everything(tmp_path):
    card = card_of_results(make_results(tmp_path), "row", tmp_path / "card", "someone/model")
    head, text = read(card)
    assert head["base_model"] == "someone/model" and head["license"] == "other"
    assert "concept-ablation" in head["tags"] and head["pipeline_tag"] == "text-to-image"
    assert "for **owl** gives **bird**" in text and "hen, duck were to stay" in text
    assert "removed, neighbors kept** (provisional: more images could change the verdict" in text
    assert (
        "| owl (target) | clip\\_accuracy | 90 % [80 %, 100 %] | 10 % [0 %, 20 %] | -80.0 [-90.0, -70.0] | 8 |"
        in text
    )
    assert "| owl (target) | clip\\_cosine | 0.9 [0.8, 1] | 0.1 [0, 0.2] | -0.8 [-0.9, -0.7] | 8 |" in text
    assert "| settings.steps | 80 |" in text and "CLIP tiny" in text
    strips = re.findall(r"!\[.*\]\((.*)\)", text)
    assert strips == ["pictures/1-target.png", "pictures/2-anchor.png", "pictures/3-neighbor.png"]
    strip = Image.open(card / strips[0])
    assert strip.size == (6 * 196 - 4, 2 * 132 - 4)
    assert strip.getpixel((10, 10)) == (255, 0, 0) and strip.getpixel((10, 250)) == (0, 0, 255)
    assert sorted(path.name for path in card.iterdir()) == ["README.md", "delta.safetensors", "pictures"]
    assert card_of_results(tmp_path / "results", "row", card) == card  # written anew
    (card / "other.txt").touch()
    with pytest.raises(CardError, match="holds other things"):
        card_of_results(tmp_path / "results", "row", card)


def test_values_of_the_table_are_no_markup(tmp_path):
    card = card_of_results(make_results(tmp_path, target=HOSTILE), "row", tmp_path / "card")
    head, text = read(card)
    assert set(head) == {"license", "pipeline_tag", "tags"}  # a folder is no base_model that a hub knows
    assert "<script" not in text and r"{{ 7\*7 }}" in text
    assert not re.search(r"^# <|^# &lt;", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("| ow")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [7, 7]
    assert r"\[a\]\(b\)" in text and r"\`x\`" in text


def test_escape():
    assert escape("a|b\n\n- c") == r"a\|b - c"
    assert escape("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert escape(3) == "3"


@pytest.mark.parametrize("group", ["unet", "embedding"])
def test_the_snippet_runs_and_loads_the_delta(group, tmp_path, monkeypatch):
    folder = make_tiny_pipeline(tmp_path / "tiny")
    pipeline = load_pipeline(folder, device="cpu")
    name = "unet.conv_in.bias" if group == "unet" else token_row_name("text_encoder", 70)
    own = (
        pipeline.unet.conv_in.bias
        if group == "unet"
        else pipeline.text_encoder.get_input_embeddings().weight[70]
    )
    results = make_results(tmp_path, tensors={name: own.detach() + 1}, base_model="../tiny")
    card = card_of_results(results, "row", tmp_path / "card")
    code = re.search(r"```python\n(.*?)```", read(card)[1], re.DOTALL)[1]
    assert ("concept_ablation" in code) == (group == "embedding")
    monkeypatch.chdir(card)
    found = {}
    exec(code, found)  # noqa: S102
    apply_delta(pipeline, "delta.safetensors")
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(model, part).state_dict() for model in (pipeline, found["pipeline"]))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_no_folder_of_this_machine_is_told(tmp_path):
    results = make_results(tmp_path, base_model="/home/someone/models/sd14")
    assert "someone" not in (card_of_results(results, "row", tmp_path / "card") / "README.md").read_text()


@pytest.mark.parametrize("kind", ["nudity", "inappropriate", "memorization"])
def test_pictures_that_are_not_to_be_published_are_left_out(kind, tmp_path):
    card = card_of_results(make_results(tmp_path, kind=kind, targets=["a", "b"]), "row", tmp_path / "card")
    assert [path.name for path in sorted((card / "pictures").iterdir())] == ["3-anchor.png", "4-neighbor.png"]
    assert "Pictures of the target aren't shown" in read(card)[1]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(CardError, match="summary.parquet: can't be read .*a run's results"):
        card_of_results(tmp_path, "row", tmp_path / "card")
    results = make_results(tmp_path)
    with pytest.raises(CardError, match=r"no concept 'other' \(allowed: row\)"):
        card_of_results(results, "other", tmp_path / "card")
    summary = results / "report" / "summary.parquet"
    about = {"concept_ablation": '{"missing": ["late"]}'}
    pq.write_table(pq.read_table(summary).replace_schema_metadata(about), summary)
    with pytest.raises(CardError, match=r"'late' is not finished .*index.html says why"):
        card_of_results(results, "late", tmp_path / "card")
    (results / "base" / "0-2.parquet").unlink()
    with pytest.raises(CardError, match="base: no pictures of owl by the base model"):
        card_of_results(results, "row", tmp_path / "card")
    (results / "concepts" / "k" / "delta.safetensors").unlink()
    with pytest.raises(CardError, match="the delta isn't there"):
        card_of_results(results, "row", tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_hub_id("CompVis/stable-diffusion-v1-4")
    assert not any(is_hub_id(name) for name in ("a/b", "/a/b", "a", "a b/c", "a/b/c", "../a", None))


def test_push_uploads_the_folder_to_a_private_repository(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **o: calls.append((repo, o)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **o: calls.append(o) or "address")
    assert push(tmp_path, "me/owl") == "address"
    assert calls[0] == ("me/owl", {"repo_type": "model", "private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == str(tmp_path) and calls[1]["repo_id"] == "me/owl"
    with pytest.raises(CardError, match="OWNER/NAME"):
        push(tmp_path, "bad name")
    assert len(calls) == 2


def test_strips_are_png(tmp_path):
    card = card_of_results(make_results(tmp_path), "row", tmp_path / "card")
    data = (card / "pictures" / "1-target.png").read_bytes()
    assert Image.open(io.BytesIO(data)).format == "PNG"
    assert json.dumps(read(card)[0])
