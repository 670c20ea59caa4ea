import logging
import subprocess
import sys

import pytest
import torch

from concept_ablation.common.files import atomic_output
from concept_ablation.common.hardware import (
    DeviceError,
    autocast,
    peak_memory,
    pick_device,
    resolve_precision,
)
from concept_ablation.common.logs import setup_logging

CPU = torch.device("cpu")


def test_atomic_output_replaces_only_on_success(tmp_path):
    path = tmp_path / "new folder" / "out.txt"
    with atomic_output(path) as part:
        part.write_text("first")
        assert part.parent == path.parent and not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), atomic_output(path) as part:
        part.write_text("second")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["out.txt"]


def test_pick_device():
    assert pick_device("cpu") == CPU
    assert pick_device().type in ("cuda", "mps", "cpu")
    with pytest.raises(DeviceError, match="'tpu' is not available here .allowed: auto, .*cpu"):
        pick_device("tpu")


def test_precision_is_refused_where_it_cannot_be():
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(DeviceError, match="fp16"):
        resolve_precision("fp16", CPU)
    with pytest.raises(DeviceError, match="allowed: auto, fp32, bf16, fp16"):
        resolve_precision("int8", CPU)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_precision_and_leaves_weights(precision, dtype):
    layer = torch.nn.Linear(3, 3)
    with autocast(precision, CPU):
        assert layer(torch.ones(1, 3)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_peak_memory_is_in_bytes():
    assert 50e6 < peak_memory(CPU) < 1e12


def test_log_holds_records_warnings_and_the_traceback(tmp_path):
    code = (
        "import logging, warnings\nfrom concept_ablation.common.logs import setup_logging\n"
        f"setup_logging({str(tmp_path / 'logs' / 'rule.log')!r})\n"
        "logging.getLogger('concept_ablation.x').info('a record'); logging.info('of a library'); warnings.warn('a warning'); raise ValueError('a crash')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    for text in (done.stderr, (tmp_path / "logs" / "rule.log").read_text()):
        assert "a record" in text and "a warning" in text and "of a library" not in text
        assert "Traceback" in text and "ValueError: a crash" in text


def test_setup_logging_replaces_handlers(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    before = logging.root.handlers[:], logging.root.level, sys.excepthook
    try:
        setup_logging(tmp_path / "a.log")
        setup_logging(tmp_path / "b.log")
        logging.getLogger("concept_ablation").info("second")
        where, *more = (tmp_path / "a.log").read_text().splitlines()
        assert where.endswith("SLURM_JOB_ID=17 CUDA_VISIBLE_DEVICES=1") and more == []
        assert "second" in (tmp_path / "b.log").read_text()
    finally:
        logging.root.handlers[:], logging.root.level, sys.excepthook = before
        logging.captureWarnings(False)
