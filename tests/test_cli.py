"""`python -m concept_ablation`: what it takes, what it says, and that a mistake is one line."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from test_card import make_results
from tiny import make_tiny_pipeline

from concept_ablation.__main__ import FORMATS, main
from concept_ablation.diffusion import delta_export as exports
from concept_ablation.diffusion.delta import load_delta, save_delta
from concept_ablation.diffusion.families.stable_diffusion import FAMILY
from concept_ablation.diffusion.pipeline import load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def delta(folder, tmp_path_factory):
    unet = load_pipeline(folder, device="cpu").unet
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"unet.{name}": value + 0.01 * torch.randn(value.shape, generator=draw)
        for name, value in FAMILY.trainable_parameters(unet, "cross-attn").items()
    }
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    save_delta(path, tensors, {"base_model": str(folder), "base_revision": None})
    return path


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['--help']\nimport concept_ablation.__main__ as cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'diffusers', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()") and "export" in done.stdout and "card" in done.stdout


def test_forms_are_those_that_can_be_written():
    assert get_args(exports.Format) == FORMATS


def test_export_and_import(delta, folder, tmp_path, capsys):
    assert main(["export", str(delta), "--to", "compvis", "--out", str(tmp_path / "d.ckpt")]) == 0
    assert f"{tmp_path / 'd.ckpt'}: compvis, 69.6 kB: 8 tensors" in capsys.readouterr().out
    arguments = [
        "import",
        str(tmp_path / "d.ckpt"),
        "--model",
        str(folder),
        "--out",
        str(tmp_path / "d.safetensors"),
    ]
    assert main(arguments) == 0
    assert "8 tensors, group cross-attn" in capsys.readouterr().out
    ours, theirs = load_delta(delta)[0], load_delta(tmp_path / "d.safetensors")[0]
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loras_ranks_and_errors_are_told(delta, tmp_path, capsys):
    assert (
        main(["export", str(delta), "--to", "lora", "--rank", "4", "--out", str(tmp_path / "l.safetensors")])
        == 0
    )
    assert "8 layers of rank 4 to 4 (median 4); relative error of the change 0." in capsys.readouterr().out


def test_a_card_is_written_and_nothing_pushed(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("nothing was to be sent")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    arguments = ["card", str(make_results(tmp_path)), "row", "--out", str(tmp_path / "card")]
    assert main(arguments) == 0
    assert (tmp_path / "card" / "README.md").is_file() and "written" in capsys.readouterr().out
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda *_, **o: sent.append(o) or "https://hub/me/owl"
    )
    assert main([*arguments, "--push", "me/owl"]) == 0
    assert sent[0]["repo_id"] == "me/owl" and "pushed to https://hub/me/owl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "none.safetensors", "--to", "lora", "--out", "x"], "none.safetensors: can't be read"),
        (
            ["export", "{delta}", "--to", "lora", "--error", "2", "--out", "x"],
            "an error bound between 0 and 1",
        ),
        (["export", "{delta}", "--to", "compvis", "--rank", "2", "--out", "x"], "lora and kohya alone"),
        (
            ["export", "{delta}", "--to", "compvis", "--model", "no/such/folder", "--out", "x"],
            "no such folder",
        ),
        (["export", "{delta}", "--to", "compvis", "--out", "/dev/null/x"], "/dev/null"),
        (["import", "none.bin", "--model", "{folder}", "--out", "x"], "none.bin: can't be read"),
        (["card", "nowhere", "row", "--out", "x"], "summary.parquet: can't be read"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, delta, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([text.format(delta=delta, folder=folder) for text in arguments]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and message in said.err
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["export", "d", "--to", "onnx", "--out", "x"], ["export", "d", "--out", "x"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_bug_is_no_users_mistake(delta, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr("concept_ablation.diffusion.delta_export.export_delta", fail)
    with pytest.raises(KeyError):
        main(["export", str(delta), "--to", "lora", "--out", str(tmp_path / "x")])
