"""A damaged file of any stage is noticed, named and set aside, so that the next run makes it anew; never read as good."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from concept_ablation.common.image_store import open_store, read_store, write_store
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.diffusion.delta import load_delta, save_delta
from concept_ablation.methods.strength import Search, write_looks
from concept_ablation.plan.graph import Plan
from concept_ablation.prompts.stage import read_prompts
from concept_ablation.report.failures import Failure, failure_text, find_failures, read_end, set_empty_aside
from concept_ablation.report.strength import read_looks
from concept_ablation.report.summary import training_record
from concept_ablation.report.tables import read_scores
from tests.shipped import CONFIG


def write_images(path):
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    rows = [{"image": image, "prompt": f"prompt {i}", "seed": i, "index": i} for i in range(20)]
    write_store(path, rows, {"a": 1})


def write_delta(path):
    save_delta(path, {"unet.x": torch.arange(1000.0)}, {"kind": "object"})


def write_prompts(path):
    path.write_text(json.dumps({"kind": "object", "anchor": "cat", "prompts": ["a cat", "the cat"]}))


def write_scores(path):
    pq.write_table(COLUMNS.empty_table(), path)


def write_record(path):
    pq.write_table(pa.table({"step": [1, 2], "seconds": [0.5, 0.5]}), path)


def read_images(path):
    return [image.size for image in read_store(path).images()]


def open_images(path):
    store = open_store(path)
    return [store.image(place).size for place in range(len(store))]


FILES = {
    "images.parquet": (write_images, read_images),
    "opened.parquet": (write_images, open_images),
    "delta.safetensors": (write_delta, load_delta),
    "prompts.json": (write_prompts, read_prompts),
    "scores.parquet": (write_scores, read_scores),
    "training.parquet": (write_record, lambda path: training_record({"training": str(path)})),
    "strength.parquet": (
        lambda path: write_looks(path, Search(), {"kind": "object"}),
        lambda path: read_looks({"strength": str(path)}),
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["half", "all but the end", "empty", "zeros", "zeros at the end", "text"])
def test_damage_is_noticed_and_names_the_file(tmp_path, name, how):
    path, (write, read) = tmp_path / name, FILES[name]
    write(path)
    assert read(path) is not None
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "half": content[:half],
            "all but the end": content[:-4],
            "empty": b"",
            "zeros": bytes(len(content)),
            "zeros at the end": content[:half] + bytes(len(content) - half),
            "text": b"no such thing",
        }[how]
    )
    with pytest.raises(ValueError, match=name) as raised:
        read(path)
    assert raised.value.damaged == path


@pytest.mark.parametrize("name", ["images.parquet", "opened.parquet", "delta.safetensors"])
def test_one_wrong_byte_is_noticed(tmp_path, name):
    path, (write, read) = tmp_path / name, FILES[name]
    write(path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as raised:
        read(path)
    assert raised.value.damaged == path


def crash(tmp_path, path):
    """What a script says that finds the file at `path` damaged, with results in tmp_path/results; and its log."""
    code = (
        "import sys\nfrom concept_ablation.common.files import damaged\nfrom concept_ablation.common.logs import setup_logging\n"
        "from concept_ablation.common.image_store import StoreError\n"
        f"setup_logging({str(tmp_path / 'rule.log')!r}, results={str(tmp_path / 'results')!r})\n"
        f"raise damaged(StoreError, {str(path)!r}, 'a damaged image store')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr, (tmp_path / "rule.log").read_text()


def test_a_damaged_result_is_set_aside_and_what_is_the_users_is_not(tmp_path):
    result, own = tmp_path / "results" / "base" / "x.parquet", tmp_path / "own.parquet"
    for path in (result, own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"damaged")
    said, log = crash(tmp_path, result)
    assert not result.exists() and result.with_name("x.parquet.damaged").read_bytes() == b"damaged"
    assert "set aside as x.parquet.damaged: run again" in said and "Traceback" not in said
    assert "Traceback" in log and log.splitlines()[-1].endswith("run again, and it is made anew")
    said, _ = crash(tmp_path, own)
    assert own.exists() and "delete it and run again" in said


class FewKeys(Plan):
    """A plan of two rows that share their anchor."""

    def __init__(self, results):
        super().__init__(str(results), CONFIG["verdict"], CONFIG["report"])
        from concept_ablation.plan.concept import Concept
        from concept_ablation.plan.graph import Row

        prompts = self.add("write_prompts", "cat", {})
        anchors = self.add("generate_anchors", "cat", {"prompts": prompts})
        for name in ("a", "b"):
            delta = self.add("ablate_concept", name, {"anchors": anchors, "n": name})
            samples = self.add("sample_ablated", name, {"delta": delta})
            base = {name: self.add("sample_base", name, {"n": name})}
            scores = self.add("score_concept", name, {"samples": samples, "base": base})
            row = Concept(name, "object", (name,), "cat")
            self.rows.append(Row(row, anchors, delta, samples, scores, base))
        self.shared = anchors


def test_a_failure_names_every_row_that_waits_for_it(tmp_path):
    plan = FewKeys(tmp_path / "results")
    (tmp_path / "x.log").write_text("one\n\n2026 CRITICAL two \x1b[2J\u202e\n")
    (failure,) = find_failures(plan, [("generate_anchors", plan.shared, str(tmp_path / "x.log"))])
    assert failure.concepts == ("a", "b") and failure.lines == ("one", "2026 CRITICAL two ?[2J?")
    own = plan.rows[1].ablation
    (failure,) = find_failures(plan, [("ablate_concept", own, "missing.log")])
    assert failure.concepts == ("b",) and "wrote no log" in failure.lines[0]
    assert "ablate_concept failed, for b (log: missing.log)\n    it wrote no log" in failure_text([failure])


def test_long_logs_and_many_failures_are_cut_short(tmp_path):
    for width, count in ((10_000, 6), (10, 12)):  # of a log's last 64 KiB
        text = "\n".join(f"line {i} CRITICAL " + "x" * width for i in range(1000))
        (tmp_path / "x.log").write_text(text)
        how, lines = read_end(tmp_path / "x.log", stopped=False)
        assert how == "failed" and len(lines) >= count and lines[-1].startswith("line 999 ")
        assert len(lines) <= 12 and max(map(len, lines)) <= 400
    many = [Failure("sample_base", str(i), tuple("abcdefgh"), "x.log", ("no",)) for i in range(30)]
    text = failure_text(many)
    assert "... and 20 more" in text and "a, b, c, d, e and 3 more" in text


def test_empty_results_are_set_aside_before_a_run(tmp_path):
    plan = FewKeys(tmp_path / "results")
    empty = tmp_path / "results" / "anchors" / f"{plan.shared}.parquet"
    empty.parent.mkdir(parents=True)
    empty.touch()
    assert set_empty_aside(plan) == [str(empty)]
    assert not empty.exists() and empty.with_name(f"{empty.name}.damaged").exists()
