"""What a model's fingerprint covers, and that files are read once: not again until they change."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from concept_ablation.common import hashes
from concept_ablation.common.hashes import file_hash, fingerprint

ROOT = Path(__file__).parents[1]
BIG = 2 * 2**20
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}
# Prints the fingerprint of a model and how often one of its files was opened.
READ = """import os, sys, time
opened = []
sys.addaudithook(lambda event, found: event == "open" and opened.append(str(found[0])))
from concept_ablation.common.hashes import fingerprint
now = time.time_ns
time.time_ns = lambda: now() + 10**10  # ten seconds later
print(fingerprint(sys.argv[1], keep=True), sum(name.endswith("weights.bin") for name in opened))"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's folder with one big file, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/weights.bin").write_bytes(bytes(BIG))
    return Path("model")


def reads(model) -> tuple[str, int]:
    """The model's fingerprint in a process of its own, ten seconds later, and how often that opened a file of weights."""
    command = [sys.executable, "-c", READ, str(model)]
    done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=True)
    found, count = done.stdout.split()
    return found, int(count)


def flip(path: Path, place: int) -> None:
    """Change one byte in place."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1")


def test_a_model_whose_keys_and_values_are_zeroed_is_another_model(tmp_path):
    before = shutil.copytree(ROOT / "embedded/emoji-diffusion", tmp_path / "before")
    after = shutil.copytree(before, tmp_path / "after")
    assert fingerprint(str(before)) == fingerprint(str(after)), "the folder's own name is no part of it"
    (weights,) = (after / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    ablated = [name for name in tensors if "attn2.to_k" in name or "attn2.to_v" in name]
    assert ablated
    save_file({name: tensors[name] * (name not in ablated) for name in tensors}, weights, {"format": "pt"})
    assert weights.stat().st_size == next((before / "unet").glob("*.safetensors")).stat().st_size
    assert fingerprint(str(before)) != fingerprint(str(after))


def test_every_byte_and_every_name_counts_of_the_files_that_decide(model):
    found = [fingerprint("model")]
    for place in (0, 100_000, BIG // 2, BIG - 1):
        flip(model / "weights.bin", place)
        found.append(fingerprint("model"))
    (model / "config.json").write_text("{}")
    found.append(fingerprint("model"))
    (model / "config.json").rename(model / "other.json")
    found.append(fingerprint("model"))
    (model / "code.py").write_text("")
    found.append(fingerprint("model"))
    assert len(set(found)) == len(found)
    (model / "README.md").write_text("words")
    assert fingerprint("model") == found[-1]


def test_a_file_is_read_once_by_all_processes_until_it_changes(model):
    first = reads(model)
    assert first[1] == 1 and first[0] == fingerprint("model")
    assert reads(model) == (first[0], 0)
    assert reads(model.absolute()) == (first[0], 0), "it is the same file by another path"
    flip(model / "weights.bin", 100_000)
    second = reads(model)
    assert second[1] == 1 and second[0] != first[0]
    assert reads(model) == (second[0], 0)


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copy2], ids=["cp", "cp --preserve"])
def test_a_file_is_read_again_when_another_of_its_size_is_copied_over_it(model, copy):
    first, weights = reads(model)[0], model / "weights.bin"
    before = weights.stat()
    other = Path("ablated.bin")
    other.write_bytes(b"\1" * BIG)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.05)  # more than a tick of the file system's clock
    copy(other, weights)
    after = weights.stat()
    assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
    assert (after.st_mtime_ns == before.st_mtime_ns) == (copy is shutil.copy2)
    assert reads(model)[0] == fingerprint("model") != first


def test_a_file_that_may_change_within_the_same_tick_is_not_remembered(model, monkeypatch):
    written = (model / "weights.bin").stat().st_ctime_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: written + 10**9)
    fingerprint("model", keep=True)
    assert reads(model)[1] == 1


def test_a_remembered_hash_that_is_damaged_is_made_again(model):
    found = reads(model)[0]
    (kept,) = hashes.KEPT.iterdir()
    whole = kept.read_bytes()
    for damage in (b"", b"\xff\0", whole[:-1], whole + b"0", whole.replace(b" ", b""), b"[" + whole):
        kept.write_bytes(damage)
        assert reads(model) == (found, 1)
        assert kept.read_bytes() == whole


@pytest.mark.parametrize("blocked", [".snakemake", ".snakemake/hashes", "the hash itself"])
def test_where_nothing_can_be_remembered_files_are_read_again(model, blocked):
    found = fingerprint("model")
    if blocked == "the hash itself":
        reads(model)
        (kept,) = hashes.KEPT.iterdir()
        kept.unlink()
        kept.mkdir()
    else:
        Path(blocked).parent.mkdir(exist_ok=True)
        Path(blocked).write_text("a file where a folder should be")
    assert reads(model) == reads(model) == (found, 1)


def test_a_command_leaves_nothing_in_the_folder_it_was_started_in(model, monkeypatch):
    now = time.time_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + 10**10)
    fingerprint("model")
    file_hash("model/weights.bin")
    assert os.listdir() == ["model"]


def test_processes_side_by_side_agree_and_leave_no_parts(model):
    command = [sys.executable, "-c", READ, "model"]
    running = [subprocess.Popen(command, env=HERE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = {process.communicate()[0].split()[0] for process in running}
    assert found == {fingerprint("model")} and len(os.listdir(hashes.KEPT)) == 1
    assert reads(model)[1] == 0


def test_links_are_followed_and_one_that_leads_back_ends(model):
    blob = Path("blob")
    (model / "weights.bin").rename(blob)
    (model / "weights.bin").symlink_to(blob.absolute())
    Path("unet").mkdir()
    Path("unet/config.json").write_text("{}")
    (model / "unet").symlink_to(Path("unet").absolute())
    (model / "again").symlink_to(model.absolute())
    found = [reads(model)[0]]
    assert reads(model) == (found[0], 0)
    flip(blob, 100_000)
    found.append(reads(model)[0])
    Path("unet/config.json").write_text('{"a": 1}')
    found.append(reads(model)[0])
    assert len(set(found)) == 3


def test_a_line_tells_of_a_file_that_takes_long(model, monkeypatch, caplog):
    fingerprint("model")
    assert not caplog.records
    monkeypatch.setattr(hashes, "LARGE", BIG)
    reads(model)
    fingerprint("model")
    assert not caplog.records, "its hash is known"
    flip(model / "weights.bin", 7)
    fingerprint("model")
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "model/weights.bin: reading its 0.0 GB"
    ]
