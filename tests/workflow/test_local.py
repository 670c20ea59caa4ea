"""One machine with several GPUs, made up here: `snakemake --profile local` gives each GPU job one of its own."""

import re

import pytest
import yaml

from tests.workflow.conftest import CAT, HEADER, SMALL

pytestmark = pytest.mark.workflow


def test_gpu_jobs_side_by_side_have_a_device_each(make_checkout, tmp_path):
    checkout = make_checkout()
    checkout.write(HEADER + CAT)
    own = {**SMALL, "runtime": {**SMALL["runtime"], "device": "auto"}}
    (checkout.folder / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    # More cores than devices: only the number of GPU jobs is limited.
    limits = ("--profile", "local", "--cores", "4", "--resources", "gpu=2")
    work = ("--configfile", "own.yaml", "--until", "sample_base", "write_prompts")
    done = checkout.snakemake(
        *limits, *work, CUDA_VISIBLE_DEVICES="5,7", CONCEPT_ABLATION_LOCKS=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout
    logs = {path: path.read_text() for path in (checkout.folder / "results" / "logs").rglob("*.log")}
    claims = {path: re.findall(r"GPU (\S+) of 5, 7$", text, re.MULTILINE) for path, text in logs.items()}
    assert sorted(path.parent.name for path in claims) == [*["sample_base"] * 3, "write_prompts"]
    for path, devices in claims.items():
        assert len(devices) == (path.parent.name == "sample_base"), path
    # 7 comes after 5, so it is only ever taken while another job has 5.
    assert {device for devices in claims.values() for device in devices} == {"5", "7"}
    assert not any("waiting" in text for text in logs.values())  # the profile's limit kept a third job back
