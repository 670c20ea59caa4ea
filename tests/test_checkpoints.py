"""A training that was killed goes on from its checkpoint and ends as one that wasn't, bit for bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_strength import finding
from test_training import PICTURES, PROMPTS, spec
from tiny import make_tiny_pipeline

from concept_ablation.common.image_store import write_store
from concept_ablation.methods.ablation import stage as module
from concept_ablation.methods.ablation.checkpoints import load_checkpoint, save_checkpoint
from concept_ablation.methods.ablation.stage import ablate_concept
from concept_ablation.methods.ablation.training import Training

STEPS = 4
FULL = {  # everything that draws random numbers or holds a state
    "steps": STEPS,
    "augmentation": "compvis",
    "prior_preservation": True,
    "prior_form": "halved",
    "batch_size": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
}


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and a store of anchor images."""
    path = tmp_path_factory.mktemp("world")
    rows = [{"image": p, "prompt": q, "seed": 0, "index": 0} for p, q in zip(PICTURES, PROMPTS, strict=True)]
    write_store(path / "anchors.parquet", rows, {})
    return make_tiny_pipeline(path / "model", size=32), path / "anchors.parquet"


def make_spec(world, **changes):
    own = spec(world[0])
    return {**own, "training": {**own["training"], **FULL, **changes}}


def ablate(world, folder, own, steps=2):
    paths = [folder / name for name in ("delta.safetensors", "training.parquet", "checkpoint.pt")]
    ablate_concept(own, world[1], *paths[:2], device="cpu", checkpoint_path=paths[2], checkpoint_steps=steps)
    assert not paths[2].exists()
    table = pq.read_table(paths[1]).to_pylist()
    kept = ("step", "loss", "prior_loss", "learning_rate", "grad_norm")
    return load_file(paths[0]), [{name: str(row[name]) for name in kept} for row in table]


def kill_at(monkeypatch, *steps):
    """Training raises after taking one of `steps`, once for each, in order."""
    left, take = list(steps), Training._take_step

    def taken(self):
        record = take(self)
        if left and record.step == left[0]:
            left.pop(0)
            raise Killed
        return record

    monkeypatch.setattr(Training, "_take_step", taken)


def assert_equal(one, other):
    assert one[0].keys() == other[0].keys() and one[1] == other[1]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What a training gives that was never stopped and wrote no checkpoint."""
    return ablate(world, tmp_path_factory.mktemp("whole"), make_spec(world), steps=0)


@pytest.mark.parametrize("kills", [(1,), (2,), (3, 4)])
def test_a_killed_training_ends_as_one_that_was_not(world, whole, tmp_path, monkeypatch, kills):
    kill_at(monkeypatch, *kills)
    taken, forward = [], Training._take_step
    monkeypatch.setattr(Training, "_take_step", lambda self: taken.append(self.step + 1) or forward(self))
    for _ in kills:
        with pytest.raises(Killed):
            ablate(world, tmp_path, make_spec(world))
        assert not (tmp_path / "delta.safetensors").exists()
    assert_equal(ablate(world, tmp_path, make_spec(world)), whole)
    starts = [step for before, step in itertools.pairwise([0, *taken]) if step != before + 1]
    # The only checkpoint is that of step 2, and a kill at step 2 comes before it.
    assert starts == [3 if kill > 2 else 1 for kill in kills]
    assert [row["step"] for row in whole[1]] == [str(step + 1) for step in range(STEPS)]


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "embedding"},
        {"group": "full-weight", "gradient_checkpointing": True},
        {"teacher": "frozen", "gradient_accumulation": 2},
        {"prior_form": "doubled", "augmentation": "diffusers", "loss": "noise-based"},
    ],
)
def test_groups_and_teachers_go_on_too(world, tmp_path, monkeypatch, changes):
    own = make_spec(world, **changes)
    expected = ablate(world, tmp_path / "whole", own)
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        ablate(world, tmp_path, own)
    assert_equal(ablate(world, tmp_path, own), expected)


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(world, whole, tmp_path):
    code = (
        "import json, sys, time; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from concept_ablation.methods.ablation import stage, training;"
        "take = training.Training._take_step;"
        # The first step after a checkpoint never ends: the kill falls in the middle of a training.
        "training.Training._take_step = lambda self: take(self) if self.step < 2 else time.sleep(600);"
        "own, store, folder = json.loads(sys.argv[1]);"
        "stage.ablate_concept(own, store, folder + '/delta.safetensors', folder + '/training.parquet',"
        " device='cpu', checkpoint_path=folder + '/checkpoint.pt', checkpoint_steps=2)"
    )
    argument = json.dumps([make_spec(world), str(world[1]), str(tmp_path)])
    process = subprocess.Popen([sys.executable, "-c", code, argument], cwd=Path(__file__).parent.parent)
    path = tmp_path / "checkpoint.pt"
    try:
        until = time.monotonic() + 120
        while not path.exists() or torch.load(path, weights_only=True)["state"]["step"] < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert_equal(ablate(world, tmp_path, make_spec(world)), whole)


@pytest.fixture(scope="module")
def content(world, tmp_path_factory):
    """The checkpoint of step 2 that a kill at step 3 leaves."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        ablate(world, folder, make_spec(world))
    return (folder / "checkpoint.pt").read_bytes()


def test_a_kill_while_a_checkpoint_is_written_keeps_the_one_before(world, content, tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes(content)

    def breaks(content, file):
        file.write(b"half")
        raise Killed

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(Killed):
        ablate(world, tmp_path, make_spec(world), steps=3)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


def damage(path, content, how):
    if how == "flip":
        content = (
            content[: len(content) // 2]
            + bytes([content[len(content) // 2] ^ 255])
            + content[len(content) // 2 + 1 :]
        )
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "pickle":
        torch.save({"fingerprint": Path("x"), "state": {}}, path)
        return
    path.write_bytes({"text": b"no checkpoint", "empty": b""}.get(how, content))


@pytest.mark.parametrize("how", ["cut", "flip", "text", "pickle", "empty"])
def test_a_damaged_checkpoint_is_named(world, content, tmp_path, caplog, how):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    assert load_checkpoint(path, make_spec(world))["step"] == 2
    damage(path, content, how)
    assert load_checkpoint(path, make_spec(world)) is None
    assert f"{path}: a damaged checkpoint, training starts afresh" in caplog.text


def test_training_starts_afresh_from_a_damaged_checkpoint(world, whole, content, tmp_path):
    damage(tmp_path / "checkpoint.pt", content, "flip")
    assert_equal(ablate(world, tmp_path, make_spec(world)), whole)


def test_a_checkpoint_of_another_training_is_named_and_not_used(world, whole, content, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "checkpoint.pt").write_bytes(content)
    other = {**make_spec(world), "seed": 4}
    assert ablate(world, tmp_path, other)[1][0]["loss"] != whole[1][0]["loss"]
    assert (
        "checkpoint.pt: a checkpoint of another training (other settings), training starts afresh"
        in caplog.text
    )
    assert "going on" not in caplog.text
    (tmp_path / "checkpoint.pt").write_bytes(content)
    ablate(world, tmp_path, make_spec(world))
    assert "checkpoint.pt: going on after step 2" in caplog.text


def test_without_steps_nothing_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_checkpoint", None)
    ablate(world, tmp_path, make_spec(world, steps=2), steps=0)


def test_a_checkpoint_is_read_without_running_code(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"a": 1}, {"step": 1, "x": torch.ones(2)})
    assert torch.load(tmp_path / "c.pt", weights_only=True)["state"]["step"] == 1
    assert torch.equal(load_checkpoint(tmp_path / "c.pt", {"a": 1})["x"], torch.ones(2))
    assert load_checkpoint(tmp_path / "none.pt", {"a": 1}) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here: it stands for a full disk")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened(Path("/dev/full"), *mode))
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path / "checkpoint.pt", {}, {"weight": torch.zeros(100_000)})
    assert not list(tmp_path.iterdir())


class Judge:
    """Validation that sees how far the weights have moved: the further, the less of the target is left."""

    def __init__(self, spec, pipeline):
        self.network = pipeline.unet
        self.start = [value.detach().clone() for value in self.network.parameters()]
        self.unchanged = None

    def look(self, spending):
        spending.next()
        moved = sum(
            float((now.detach() - then).abs().sum())
            for now, then in zip(self.network.parameters(), self.start, strict=True)
        )
        return finding(0.9 - moved / 1e4, 0.0)


@pytest.mark.parametrize("kills", [("step", 1), ("step", 3), ("look", 2), ("look", 5)])
def test_a_killed_search_ends_as_one_that_was_not(world, tmp_path, monkeypatch, kills):
    """Two rungs of four steps, looked at after two and four, at two scales; none serves."""
    monkeypatch.setattr(module, "Validation", Judge)
    search = {
        "looks": [2],
        "scales": [1.0, 2.0],
        "ladder": [{"learning_rate": 1e-4}, {"learning_rate": 2e-4}],
    }
    own = {**make_spec(world, preserve="none"), "search": search, "validation": {"alpha": 0.05}}
    expected, looks = (
        ablate(world, tmp_path / "whole", own),
        pq.read_table(tmp_path / "whole" / "strength.parquet"),
    )
    assert [look["step"] for look in looks.to_pylist()] == [2, 4, 4] * 2
    assert [look["scale"] for look in looks.to_pylist()] == [1, 1, 2] * 2
    assert [look["chosen"] for look in looks.to_pylist()].index(True) == 5
    kind, number = kills
    if kind == "step":
        kill_at(monkeypatch, number, number)
    else:
        count, look = itertools.count(1), Judge.look

        def killed(self, spending):
            if next(count) == number:
                raise Killed
            return look(self, spending)

        monkeypatch.setattr(Judge, "look", killed)
    ends = 0
    while True:
        try:
            found = ablate(world, tmp_path, own, steps=1)
            break
        except Killed:
            ends += 1
    assert ends
    assert_equal(found, expected)
    again = pq.read_table(tmp_path / "strength.parquet")
    assert again.to_pylist() == looks.to_pylist()
