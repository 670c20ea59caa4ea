"""Methods side by side: which rows count, the means and their intervals, the figure."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation.common.image_store import METADATA_KEY
from concept_ablation.report.methods import MEASURES, MethodRows, cell, compare_methods, measures_of
from concept_ablation.report.methods_figure import _Scale, methods_figure, shown_methods

LEFT, NEIGHBORS = (
    next(one for one in MEASURES if one.column == column)
    for column in ("presence_ablated", "neighbor_recognition_change")
)


@pytest.fixture
def case(tmp_path):
    """Rows and lines of two targets by two methods, and of a third target by one."""
    rows, lines = [], []

    def add(target, method, removed, left, lost, gone=None):
        name = f"{target}-{method}"
        path = tmp_path / f"{name}.parquet"
        about = {} if method == "ablation" else {"method": method}
        pq.write_table(pa.table({"step": [1]}).replace_schema_metadata({METADATA_KEY: json.dumps(about)}), path)  # fmt: skip
        looks = None
        if gone is not None:
            looks = tmp_path / f"{name}.looks.parquet"
            pq.write_table(pa.Table.from_pylist([{"scale": 1.0, "gone": gone}]), looks)
        rows.append({"concept": name, "training": str(path), "strength": looks and str(looks)})
        line = {"concept": name, "kind": "object", "target": target, "anchor": "thing", "removed": removed}
        line |= {"presence_ablated": left, "neighbor_recognition_change": -lost, "training_seconds": 0.5}
        lines.append(line)

    add("owl", "ablation", True, 0.0, 0.1)
    lines[0]["strength_found"] = True
    add("owl", "uce", True, 0.1, 0.3, gone=False)
    add("fox", "ablation", True, 0.1, 0.0)
    add("fox", "uce", False, 0.9, 0.0, gone=True)
    add("bee", "uce", True, 0.0, 0.9)
    return rows, lines


def test_only_targets_of_several_methods_count_and_retention_only_where_the_target_is_gone(case):
    ours, uce = compare_methods(*case)
    assert (ours.name, ours.removed, uce.name, uce.removed, len(uce.lines)) == ("ablation", 2, "uce", 1, 2)
    assert uce.values(NEIGHBORS) == [0.3] and uce.values(LEFT) == [0.1, 0.9]
    assert (uce.at_once, uce.searched) == (1, 2) and ours.at_once is None
    assert ours.found == "1 of 1" and uce.found == "–"
    mean, low, high = ours.mean(NEIGHBORS)
    assert mean == pytest.approx(0.05) and low == pytest.approx(0.0) and high == pytest.approx(0.1)
    assert math.isnan(uce.mean(NEIGHBORS)[1]), "one target has no interval"
    assert cell(NEIGHBORS, ours) == "5 % (0 % to 10 %)" and cell(NEIGHBORS, uce) == "30 %"


def test_an_interval_does_not_depend_on_the_order_of_the_rows():
    lines = [
        {"presence_ablated": share, "removed": True} for share in (0.0, 0.02, 0.3, 0.07, 0.15, 0.01, 0.9)
    ]
    assert MethodRows("uce", lines).mean(LEFT) == MethodRows("uce", lines[::-1]).mean(LEFT)


@pytest.mark.parametrize("most", [0.4, 1.0, 3.0, 20.0, 999.0, 3216.5, 7000.0])
def test_no_mark_lies_beyond_the_last_tick_of_its_panel(most):
    number = next(one for one in MEASURES if one.unit == "number")
    scale = _Scale(number, [0.0, most])
    assert scale.place(scale.ticks[-1][0]) == 1.0 and most <= scale.ticks[-1][0]


def test_a_measure_that_no_row_has_is_left_out(case):
    rows, lines = case
    methods = compare_methods(rows, lines)
    assert [one.column for one in measures_of(methods)] == ["presence_ablated", "neighbor_recognition_change", "training_seconds"]  # fmt: skip
    for line in lines:
        line["unnamed_change"] = -0.25
    assert "unnamed_change" in [one.column for one in measures_of(compare_methods(rows, lines))]


def test_the_interval_covers_the_mean_as_often_as_it_says():

    generator, held = np.random.default_rng(1), 0
    for _ in range(200):
        lines = [{"removed": True, "presence_ablated": value} for value in generator.uniform(0, 1, 30)]
        _, low, high = MethodRows("uce", lines).mean(LEFT)
        held += low <= 0.5 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_figure_has_a_mark_a_row_and_escapes_names(case):
    rows, lines = case
    lines[0]["concept"] = "<b>owl"
    svg = methods_figure(compare_methods(rows, lines))
    assert svg.count("<title>") == 3 * 4 and "&lt;b&gt;owl" in svg and "<b>" not in svg
    assert "nan" not in svg and svg.count('fill="none"') >= 3, "the fox of uce is hollow"


def test_a_table_of_one_method_has_no_section(case):
    rows, lines = case
    assert shown_methods(rows[4:], lines[4:])["methods"] == []
    assert shown_methods(rows[4:], lines[4:])["methods_figure"] == ""


def test_the_table_of_make_compare_has_every_row_by_every_method(monkeypatch):
    from pathlib import Path

    from concept_ablation.common.settings import merge
    from concept_ablation.plan.schema import read_config
    from concept_ablation.plan.specs import load_plan
    from concept_ablation.registries import METHODS

    monkeypatch.chdir(Path(__file__).parents[1])
    config = read_config("config/config.yaml")
    merge(config, read_config("bench/compare.yaml"))
    _, plan = load_plan(config, Path("workflow/schemas"), "bench/compare.yaml")
    by_target = {}
    for row in plan.rows:
        spec = plan.specs["ablate_concept"][row.ablation]
        by_target.setdefault(row.concept.target, []).append(spec.get("method", "ablation"))
    assert len(by_target) >= 12 and all(sorted(own) == sorted(METHODS) for own in by_target.values())
