"""Rows of one target side by side."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation.__main__ import main
from concept_ablation.report.compare import CompareError, compare_rows
from concept_ablation.report.summary import summary_schema


def write(folder, *lines):
    plain = {
        "kind": "object",
        "target": "owl",
        "anchor": "bird",
        "presence_base": 1.0,
        "presence_ablated": 0.04,
    }
    plain |= {
        "neighbor_recognition_change": -0.01,
        "worst_neighbor_typical_change": -0.25,
        "worst_neighbor": "duck",
    }
    plain |= {
        "anchor_typical_change": 0.0,
        "neighbor_kid_x1000": 1.4,
        "anchor_kid_x1000": 12.0,
        "strength_found": True,
    }
    plain |= {"training_seconds": 13.0, "validation_seconds": 12.0}
    (folder / "report").mkdir(parents=True)
    table = pa.Table.from_pylist([plain | line for line in lines], schema=summary_schema())
    pq.write_table(table, folder / "report" / "summary.parquet")
    return folder


def test_rows_of_one_target_stand_together(tmp_path, capsys):
    fixed = {"concept": "owl-paper", "strength_found": None, "validation_seconds": None}
    other = {"concept": "fox", "target": "fox", "anchor": "animal"}
    write(tmp_path / "r", {"concept": "owl-ours"}, fixed, other)
    assert main(["compare", str(tmp_path / "r")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "object owl -> bird"
    assert [line.split()[0] for line in lines[2:4]] == ["owl-ours", "*"]
    assert "−25.0 duck" in lines[2] and lines[2].split()[-1] == "25" and lines[3].split()[-1] == "13"
    assert "fox" not in "".join(lines) and "not at equal erasure" in lines[-1]


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(CompareError, match="there is no such table; run the workflow first"):
        compare_rows(tmp_path)
    with pytest.raises(CompareError, match="no target is removed by two rows. Name it in several rows"):
        compare_rows(write(tmp_path / "r", {"concept": "owl"}))
