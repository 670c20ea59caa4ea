"""`make check`: the config, the table and every row's prompts are read, and nothing runs."""

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from concept_ablation.__main__ import main

ROOT = Path(__file__).parents[1]
UNKNOWN = "concept,kind,target,anchor\nx,object,xqzvpt,bird\n"
GOOD = "concept,kind,target,anchor,neighbors\nowl,object,owl,bird,penguin\n"


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """`check(table, config)` gives the exit status and what was said of a table in a checkout of its own."""
    monkeypatch.chdir(ROOT)

    def run(table: str, config: dict | None = None) -> tuple[int, str]:
        (tmp_path / "rows.csv").write_text(table)
        overlay = {"concepts": str(tmp_path / "rows.csv"), **(config or {})}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
        status = main(["check", "--configfile", str(tmp_path / "own.yaml")])
        said = capsys.readouterr()
        return status, (said.out + said.err).replace(str(tmp_path) + "/", "")

    return run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(cache, revision: str, *names: str) -> None:
    """Put these parts of the embedded model into the cache as `hf download` does: links to blobs."""
    for name in names:
        link = cache / "models--someone--model" / "snapshots" / revision / name
        blob = cache / "models--someone--model" / "blobs" / name.replace("/", "-")
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "embedded/emoji-diffusion" / name, blob)
        link.symlink_to(blob)


def test_the_shipped_rows_have_nothing_to_say(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check"]) == 0
    assert "0 warnings" in capsys.readouterr().out


def test_without_the_model_of_the_overlay_one_line_says_what_is_not_checked(capsys, monkeypatch, cache):
    monkeypatch.chdir(ROOT)
    assert main(["check", "--configfile", "config/sd14.yaml"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].endswith("8 rows read, 1 warnings")
    assert said[0].startswith(
        "model: without its tokenizer, too long prompts and unknown words can't be found"
    )
    assert f"CompVis/stable-diffusion-v1-4 is not in this machine's cache ({cache})" in said[0]
    assert (
        "`hf download CompVis/stable-diffusion-v1-4 --revision 133a221b8aa7292a167afc5127cb63fb5005638b`"
        in said[0]
    )


def test_a_hub_ids_tokenizer_is_read_from_the_cache(check, cache):
    hub = {"model": {"path": "someone/model", "revision": "c0ffee"}}
    snapshot(cache, "beef", "model_index.json", "tokenizer/tokenizer.json")
    assert "someone/model is not in this machine's cache" in check(UNKNOWN, hub)[1], "another revision"
    snapshot(cache, "c0ffee", "model_index.json")
    assert "holds no readable tokenizer" in check(UNKNOWN, hub)[1]
    snapshot(cache, "c0ffee", "tokenizer/tokenizer.json")
    status, said = check(UNKNOWN, hub)
    assert status == 0 and "rows.csv:2: warning: target 'xqzvpt'" in said and "1 warnings" in said
    status, said = check(UNKNOWN, {"model": {"path": "./no/such/id", "revision": "c0ffee"}})
    assert status == 0 and "./no/such/id is not a folder, a file or a hub id" in said


def test_a_single_files_tokenizer_is_that_of_its_config(check, tmp_path):
    (tmp_path / "one.ckpt").write_bytes(b"weights")
    (tmp_path / "v1.yaml").write_text("model: {}")
    one = {"path": str(tmp_path / "one.ckpt")}
    status, said = check(UNKNOWN, {"model": {**one, "config": "embedded/emoji-diffusion"}})
    assert status == 0 and "rows.csv:2: warning: target 'xqzvpt'" in said and "1 warnings" in said
    for config in (None, str(tmp_path / "v1.yaml")):
        status, said = check(UNKNOWN, {"model": {**one, "config": config}})
        assert status == 0 and "1 warnings" in said
        assert (
            "one.ckpt is one file, without a tokenizer; set model.config to the folder of a diffusers" in said
        )


def test_warnings_name_the_line_and_leave_the_status_alone(check):
    status, said = check(GOOD + "cat,object,pouting cat,cat,cats\n")
    assert status == 0 and "rows.csv:3: warning: neighbor 'cats' is the anchor 'cat'" in said
    assert "2 rows read, 1 warnings" in said


def test_prompts_that_can_teach_nothing_are_an_error(check, tmp_path):
    (tmp_path / "same.txt").write_text("a dog\n")
    table = f"concept,kind,target,anchor,prompts\nowl,object,owl,bird,{tmp_path / 'same.txt'}\n"
    status, said = check(table)
    assert status == 2 and "rows.csv:2" in said and "contains the anchor 'bird'" in said


def test_mistakes_of_config_and_table_are_told_as_in_a_run(check):
    status, said = check(GOOD, {"training": {"stepz": 1}})
    assert status == 2 and "training.stepz: unknown key (did you mean 'steps'?)" in said
    status, said = check(GOOD + "x,styel,a,b,\n")
    assert status == 2 and "rows.csv:3: column 'kind': 'styel' is not one of" in said
