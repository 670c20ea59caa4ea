"""The verdict rule, and the two tables made from rows' scores."""

import json
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation import verdict
from concept_ablation.common.roles import is_pooled
from concept_ablation.common.score_table import COLUMNS, LATER
from concept_ablation.evaluation import statistics as metrics
from concept_ablation.methods.ablation.training import StepRecord
from concept_ablation.methods.records import write_records
from concept_ablation.registries import KINDS
from concept_ablation.report.columns import write_columns
from concept_ablation.report.csv_table import dtypes
from concept_ablation.report.summary import summary_schema
from concept_ablation.report.tables import (
    TableError,
    aggregate_scores,
    mark_complete,
    missing_rows,
    relocate_paths,
    write_table,
)
from concept_ablation.verdict import Presence, decide, read_thresholds
from tests.shipped import CONFIG, report_spec, thresholds


def share(value, count):
    ones = round(value * count)
    return metrics.proportion(np.repeat([1.0, 0.0], [ones, count - ones]))


def presence(before, after, n=40, neutral=None, target="pouting cat"):
    made = share(after, n)
    return Presence(target, before, made.value, made.low, made.high, neutral)


def losses(neighbors=0.0, anchor=0.0, n=100, worst=0.0, n_worst=100):
    """The summary's columns that a verdict reads: the share of images lost, among `n` (None: not measured)."""
    columns = {}
    lost = [("neighbor_recognition_change", neighbors, n), ("anchor_typical_change", anchor, n)]
    for name, loss, count in (*lost, ("worst_neighbor_typical_change", worst, n_worst)):
        estimate = (None,) * 3
        if loss is not None:
            change = np.zeros(count)
            change[: round(abs(loss) * count)] = -np.sign(loss)
            estimate = metrics.paired_proportion_difference(change, np.zeros(count))[:3]
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    return columns


def verdict_on(kind="object", target=(0.95, 0.05), limits=None, n=40, neutral=None, **lost):
    return decide(kind, [presence(*target, n, neutral)], losses(**lost), limits or thresholds())


@pytest.mark.parametrize(
    ("case", "words", "firm"),
    [
        ({}, verdict.KEPT, True),
        ({"target": (0.95, 0.2)}, verdict.KEPT, False),  # "at most" holds the limit; its interval does not
        ({"neighbors": 0.05}, verdict.KEPT, False),  # a loss of exactly five points is allowed
        ({"neighbors": 0.06}, verdict.HARMED, False),
        ({"neighbors": 0.3}, verdict.HARMED, True),
        ({"anchor": 0.5, "n_lost": 1000}, verdict.KEPT, False),
        ({"anchor": 0.6, "n_lost": 1000}, verdict.ANCHOR_HARMED, True),
        ({"anchor": 0.7, "neighbors": 0.3}, verdict.HARMED, True),
        ({"target": (0.95, 0.9), "anchor": 0.9}, verdict.PRESENT, True),
        ({"target": (0.95, 0.25)}, verdict.PRESENT, False),
        ({"target": (1, 0.5), "n": 6}, verdict.TARGET_WIDE, False),
        ({"target": (1, 1), "n": 6}, verdict.PRESENT, True),  # few images, but they leave no doubt
        ({"neighbors": 1 / 6, "n_lost": 6}, verdict.NEIGHBORS_WIDE, False),
        ({"target": (0.3, 0)}, verdict.NOT_SHOWN, False),
        ({"worst": 0.7, "n_worst": 200}, verdict.ONE_HARMED, True),
        ({"worst": 0.7, "n_worst": 16}, verdict.ONE_WIDE, False),
        ({"worst": 0.4, "n_worst": 16}, verdict.KEPT, False),  # chance alone makes one of several the worst
        ({"worst": 0.7, "n_worst": 200, "neighbors": 0.3}, verdict.HARMED, True),
        ({"worst": 0.7, "n_worst": 200, "anchor": 0.9}, verdict.ONE_HARMED, True),
        ({"worst": 0.9, "target": (0.95, 0.9)}, verdict.PRESENT, True),
    ],
)
def test_verdicts_of_objects(case, words, firm):
    target, n = case.get("target", (0.95, 0.05)), case.get("n", 40)
    lost = losses(
        case.get("neighbors", 0.0),
        case.get("anchor", 0.0),
        case.get("n_lost", 100),
        case.get("worst", 0.0),
        case.get("n_worst", 100),
    )
    result = decide("object", [presence(*target, n)], lost, thresholds())
    assert (result.verdict, result.firmness) == (words, "firm" if firm else "provisional")
    assert (result.target_limit, result.deciding_target) == (0.2, "pouting cat")


def test_a_style_may_stay_as_visible_as_it_is_without_being_asked_for():
    case = {"target": (1, 0.3), "neutral": 0.25}
    assert verdict_on("object", **case).verdict == verdict.PRESENT
    style = verdict_on("style", **case)
    assert style.verdict == verdict.KEPT and style.target_limit == pytest.approx(0.35)


def test_one_ruined_neighbor_is_not_hidden_by_the_others():
    result = decide("object", [presence(1, 0.0)], losses(neighbors=0.0, worst=0.7, n_worst=200), thresholds())
    assert (result.verdict, result.kept) == (verdict.ONE_HARMED, False)
    assert decide("object", [presence(1, 0.0)], losses(worst=0.5, n_worst=200), thresholds()).kept


def test_a_style_s_interval_knows_that_its_limit_was_estimated_too():
    """The target alone is firmly below its limit; the neutral share's own interval leaves a doubt."""
    target, neutral = np.repeat([1.0, 0.0], [24, 176]), np.repeat([1.0, 0.0], [2, 22])
    after, above = metrics.proportion(target), metrics.share_difference(target, neutral)
    limit = neutral.mean() + thresholds().style_margin
    assert after.high < limit
    place = Presence("ink", 1.0, after.value, after.low, after.high, neutral.mean(), above[:3])
    result = decide("style", [place], losses(n=2000, n_worst=2000), thresholds())
    assert (result.removed, result.firmness, result.target_limit) == (True, "provisional", limit)
    assert result.target_excess == pytest.approx(after.value - limit)
    assert result.target_excess_low == pytest.approx(above.low - 0.1)
    assert result.target_excess_high == pytest.approx(above.high - 0.1) and result.target_excess_high > 0


def test_a_limit_above_the_neutral_share_is_the_kind_s_own(monkeypatch):
    monkeypatch.setattr(type(KINDS["style"]), "limit", "target_max")
    place = Presence("ink", 1.0, 0.25, 0.2, 0.3, 0.1, (0.15, 0.12, 0.18))
    result = decide("style", [place], losses(n=2000, n_worst=2000), thresholds())
    assert (result.removed, result.firmness) == (True, "firm")
    assert result.target_excess == pytest.approx(0.15 - thresholds().target_max)


@pytest.mark.parametrize(
    ("kind", "limit"), [("memorization", 0.1), ("nudity", 0.2), ("inappropriate", 0.2), ("object", 0.2)]
)
def test_each_kind_has_its_limit(kind, limit):
    result = verdict_on(kind, target=(1, limit))
    assert (result.verdict, result.target_limit) == (verdict.KEPT, limit)
    assert verdict_on(kind, target=(1, limit + 0.05)).verdict == verdict.PRESENT


def test_a_row_without_neighbors_is_not_called_harmless():
    result = verdict_on(neighbors=None)
    assert result.verdict == verdict.ALONE and result.kept is None and result.removed and result.anchor_kept
    assert verdict_on(neighbors=None, anchor=0.6).verdict == verdict.ANCHOR_HARMED


def test_harm_that_was_measured_is_told_though_something_else_is_undecided():
    def verdict_of(neighbors, anchor):
        wide = {name: value for name, value in losses(anchor=anchor, n=8).items() if "anchor" in name}
        return decide("object", [presence(1, 0.0)], losses(neighbors=neighbors) | wide, thresholds()).verdict

    assert verdict_of(neighbors=0.0, anchor=0.5) == verdict.ANCHOR_WIDE
    assert verdict_of(neighbors=0.2, anchor=0.5) == verdict.HARMED


def test_every_target_must_be_gone():
    gone, there = presence(1, 0.0, target="weary cat"), presence(1, 0.6, target="crying cat")
    result = decide("object", [gone, there, gone], losses(), thresholds())
    assert (result.verdict, result.removed, result.deciding_target) == (verdict.PRESENT, False, "crying cat")
    pooled = presence(1, 0.2)  # what the three are together would pass
    assert decide("object", [pooled], losses(), thresholds()).removed
    assert decide("object", [gone, presence(1, 0.1)], losses(), thresholds()).removed


def test_of_several_targets_the_least_certain_one_settles_it():
    sure, unsure = presence(1, 0.0, n=200), presence(1, 0.15, n=20, target="weary cat")
    result = decide("object", [sure, unsure], losses(n=2000), thresholds())
    assert (result.removed, result.firmness, result.deciding_target) == (True, "provisional", "weary cat")
    there, barely = presence(1, 0.9, target="owl"), presence(1, 0.25)
    result = decide("object", [barely, there], losses(), thresholds())
    assert (result.firmness, result.deciding_target) == ("firm", "owl")  # one that is surely there is enough


def test_every_target_must_have_been_there():
    rare = presence(0.3, 0.0, target="weary cat")
    assert decide("object", [presence(1, 0.0), rare], losses(), thresholds()).verdict == verdict.NOT_SHOWN


def test_each_style_is_held_against_its_own_neutral_share():
    ink, neon = presence(1, 0.3, neutral=0.25, target="ink"), presence(1, 0.3, neutral=0.05, target="neon")
    result = decide("style", [ink, neon], losses(), thresholds())
    assert (result.removed, result.deciding_target) == (False, "neon")
    assert result.target_limit == pytest.approx(0.15)


def test_thresholds_come_from_the_config():
    assert verdict_on(target=(1, 0.3), limits=thresholds(target_max=0.4)).verdict == verdict.KEPT
    assert read_thresholds(report_spec([])) == thresholds()
    given = CONFIG["verdict"] | {"target_max": 0.1}
    assert read_thresholds({"rows": [], "verdict": given}).target_max == 0.1
    with pytest.raises(ValueError, match="unknown targets_max .allowed: target_max"):
        read_thresholds({"rows": [], "verdict": given | {"targets_max": 0.1}})
    del given["base_min"]
    with pytest.raises(ValueError, match="base_min missing"):
        read_thresholds({"rows": [], "verdict": given})


def score_line(concept, role, metric, side, value, low=None, high=None, probe=""):
    line = (
        dict.fromkeys(COLUMNS.names, "")
        | dict.fromkeys(LATER)
        | {
            "pooled": is_pooled(role),
            "concept": concept,
            "probe": probe,
            "role": role,
            "metric": metric,
            "side": side,
        }
    )
    return line | {"value": value, "ci_low": value if low is None else low, "ci_high": high or value, "n": 40}


def write_row(folder, concept, kind="object"):
    lines = [
        score_line(concept, "target", "clip_accuracy", "base", 1.0, 0.9, 1.0, probe=concept),
        score_line(concept, "target", "clip_accuracy", "ablated", 0.0, 0.0, 0.1, probe=concept),
        score_line(concept, "anchor", "clip_accuracy", "base", 0.1),
        score_line(concept, "neighbors", "recognition", "difference", -0.01, -0.04, 0.02),
        score_line(concept, "anchor", "typical", "difference", -0.1, -0.15, 0.02),
        score_line(concept, "neighbors", "kid_x1000", "ablated", 3.5, 1.0, 9.0),
        score_line(concept, "target", "clip_cosine", "ablated", 0.3),
        score_line(concept, "target", "image_similarity", "ablated", 0.4),
    ]
    scores, training, delta = (folder / f"{concept}.{end}" for end in ("scores", "training", "delta"))
    pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), scores)
    write_records(
        training,
        [asdict(StepRecord(i, 0.2, np.nan, 1e-4, 1.0, 0.5 / i, 6_000_000 * i)) for i in (1, 2)],
        {},
    )
    delta.write_bytes(b"0" * 2_000_000)
    names = {
        "concept": concept,
        "kind": kind,
        "target": concept,
        "targets": [concept],
        "anchor": "cat",
        "neighbors": ["owl", "duck"],
    }
    return names | {
        "scores": str(scores),
        "training": str(training),
        "delta": str(delta),
        "samples": "",
        "base": {},
    }


def test_both_tables_and_their_csv_copies(tmp_path):
    rows = [write_row(tmp_path, "weary cat"), write_row(tmp_path, 'odd, "name"')]
    aggregate_scores(report_spec(rows), tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    wide = pq.read_table(tmp_path / "summary.parquet")
    assert wide.schema.names == summary_schema().names
    first, second = wide.to_pylist()
    assert [first["concept"], second["concept"]] == [
        'odd, "name"',
        "weary cat",
    ]  # sorted, whatever the order given
    assert (second["verdict"], second["removed"], second["kept"], second["firmness"]) == (
        verdict.KEPT,
        True,
        True,
        "firm",
    )
    assert second["neighbors"] == ["owl", "duck"]
    assert (second["target_accuracy_ablated"], second["target_accuracy_ablated_high"]) == (0.0, 0.1)
    assert (second["measure"], second["deciding_target"], second["target"]) == (
        "clip_accuracy",
        *["weary cat"] * 2,
    )
    assert (second["presence_ablated"], second["presence_ablated_high"]) == (0.0, 0.1)
    assert (second["anchor_typical_change"], second["anchor_kept"]) == (-0.1, True)
    assert (second["neighbor_kid_x1000"], second["neighbor_kid_x1000_high"]) == (3.5, 9.0)
    assert (second["steps"], second["training_seconds"], second["peak_memory_mb"]) == (2, 0.75, 12.0)
    assert (second["delta_mb"], second["target_images"]) == (2.0, 40)
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 16
    import pandas as pd

    for name in ("scores", "summary"):
        copy, original = pd.read_csv(tmp_path / f"{name}.csv"), pq.read_table(tmp_path / f"{name}.parquet")
        assert list(copy.columns) == original.schema.names and len(copy) == original.num_rows
        assert copy.concept.tolist() == original.column("concept").to_pylist()


def test_columns_of_csv_keep_their_types(tmp_path):
    """Whole floats, integers of which some are missing, flags, lists, and columns that are empty, by the types that `columns.json` tells."""
    import pandas as pd

    fields = {
        "whole": (pa.float64(), [1.0, 2.0, None, 1e300]),
        "part": (pa.float64(), [0.1, -1e-20, 1 / 3, None]),
        "count": (pa.int64(), [3, None, -4, 2**60]),
        "flag": (pa.bool_(), [True, None, False, None]),
        "text": (pa.string(), ['say "a, b"', "two\nlines", None, "007"]),
        "list": (pa.list_(pa.string()), [["owl", "duck"], [], None, ["fox"]]),
        "empty": (pa.int64(), [None] * 4),
        "blank": (pa.string(), [None] * 4),
    }
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in fields.items()})
    write_table([table, table], tmp_path / "t.parquet", table.schema)
    types = dtypes(table.schema)
    assert (
        types["count"] == types["empty"] == "Int64"
        and types["whole"] == "Float64"
        and types["list"] == "string"
    )
    copy = pd.read_csv(tmp_path / "t.csv", dtype=types)
    assert {name: str(kind) for name, kind in copy.dtypes.items()} == types and len(copy) == 8
    for name, (_, values) in fields.items():
        expected = (
            ["; ".join(value) or None if value is not None else None for value in values]
            if name == "list"
            else values
        )
        found = [None if pd.isna(value) else value for value in copy[name]]
        assert found == expected * 2, name
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[1].startswith('1.0,0.1,3,true,"say ""a, b""","owl; duck",,') and lines[0].startswith(
        '"whole","part"'
    )


def test_the_summary_says_with_what_it_was_made_and_its_types_are_told(tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setenv("CONCEPT_ABLATION_RUN", "20260102T030405Z-9f3a")
    row = write_row(tmp_path, "a") | {"keys": {"row_key": "a.1", "samples_key": "a.2", "delta_key": "a.3"}}
    spec = report_spec([row]) | {"model": {"path": "some/model", "revision": "r", "fingerprint": "f"}}
    costs = {"a": {"cost_seconds": 12.0, "cost_jobs": 3}}
    aggregate_scores(spec, tmp_path / "scores.parquet", tmp_path / "summary.parquet", None, costs)
    table = pq.read_table(tmp_path / "summary.parquet")
    (line,) = table.to_pylist()
    assert [line[name] for name in ("row_key", "samples_key", "delta_key")] == ["a.1", "a.2", "a.3"]
    assert (line["base_model"], line["base_revision"], line["base_fingerprint"]) == ("some/model", "r", "f")
    assert (line["run"], line["version_torch"]) == ("20260102T030405Z-9f3a", version("torch"))
    limits = [
        line[f"{name}_limit"] for name in ("neighbor_recognition", "worst_neighbor_typical", "anchor_typical")
    ]
    assert limits == [-0.05, -0.5, -0.5] and (line["cost_seconds"], line["cost_jobs"]) == (12.0, 3)
    for name in ("summary", "scores"):
        about = json.loads(pq.read_schema(tmp_path / f"{name}.parquet").metadata[b"concept_ablation"])
        assert (about["run"], about["model"]["path"], about["versions"]["torch"]) == (
            "20260102T030405Z-9f3a",
            "some/model",
            version("torch"),
        )
    write_columns(tmp_path / "columns.json")
    types = json.loads((tmp_path / "columns.json").read_text())
    assert set(types) == {"scores", "summary", "costs", "interference", "bundles"}
    copy = pd.read_csv(tmp_path / "summary.csv", dtype=types["summary"])
    assert list(copy.columns) == table.schema.names == list(types["summary"])
    for name, kind in types["summary"].items():
        value, (found,) = line[name], copy[name]
        expected = ("; ".join(value) if isinstance(value, list) else value) if value != [] else None
        assert str(copy[name].dtype) == kind and (
            pd.isna(found) if expected in (None, "") else found == expected
        ), name


def test_tables_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = [write_row(tmp_path, "a"), write_row(tmp_path, "b")]
    for number, given in enumerate([rows, rows[::-1]]):
        aggregate_scores(
            report_spec(given), tmp_path / f"scores{number}.parquet", tmp_path / f"summary{number}.parquet"
        )
    for name in ("scores", "summary"):
        for end in ("parquet", "csv"):
            first, second = (tmp_path / f"{name}{number}.{end}" for number in (0, 1))
            assert first.read_bytes() == second.read_bytes()


def test_no_rows_give_empty_tables(tmp_path):
    aggregate_scores(report_spec([]), tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    assert pq.read_table(tmp_path / "summary.parquet").num_rows == 0


def test_tables_say_which_rows_they_lack_and_a_whole_report_has_a_mark(tmp_path):
    spec = report_spec([write_row(tmp_path, "a")]) | {"missing": ["b", "c"]}
    tables = [tmp_path / "scores.parquet", tmp_path / "summary.parquet"]
    aggregate_scores(spec, *tables)
    for table in tables:
        about = json.loads(pq.read_schema(table).metadata[b"concept_ablation"])
        assert (about["rows"], about["missing"]) == (1, ["b", "c"])
        assert missing_rows(pq.read_table(table)) == ["b", "c"]
    del spec["missing"]
    aggregate_scores(spec, *tables)
    mark_complete(spec, tmp_path / "complete.json")
    about = json.loads((tmp_path / "complete.json").read_text())
    assert about == json.loads(pq.read_schema(tables[0]).metadata[b"concept_ablation"])
    assert (about["rows"], about["missing"]) == (1, []) and about["version"]


def test_damaged_and_foreign_scores_are_named(tmp_path):
    row = write_row(tmp_path, "a")
    for content, says in [(b"PAR1 broken", "can't be read"), (None, "not this version's")]:
        if content is None:
            pq.write_table(pa.table({"x": [1]}), row["scores"])
        else:
            (tmp_path / "a.scores").write_bytes(content)
        with pytest.raises(TableError, match=says):
            aggregate_scores(report_spec([row]), tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def pooled_row(folder, kind, measure):
    """Two targets, pooled in between; scores of the kind's measure and of CLIP."""
    row = write_row(folder, "both", kind)
    lines = [
        score_line("both", role, metric, model, value, probe=probe)
        for role, probe, after in (("target", "a", 0.0), ("target", "b", 0.4), ("targets", "targets", 0.2))
        for metric, scale in (
            (measure, 1.0),
            ("clip_accuracy" if measure != "clip_accuracy" else "content", 0.5),
        )
        for model, value in (("base", scale), ("ablated", after * scale), ("difference", (after - 1) * scale))
    ]
    lines += [score_line("both", "anchor", measure, "base", 0.03, probe="cat")]
    pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), row["scores"])
    return row | {"targets": ["a", "b"], "target": "a; b", "neighbors": []}


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("object", "clip_accuracy"),
        ("memorization", "copy_rate"),
        ("nudity", "detected"),
        ("inappropriate", "detected"),
    ],
)
def test_the_target_columns_pool_all_targets_by_the_kind_s_measure(tmp_path, kind, measure):
    aggregate_scores(
        report_spec([pooled_row(tmp_path, kind, measure)]),
        tmp_path / "long.parquet",
        tmp_path / "wide.parquet",
    )
    (line,) = pq.read_table(tmp_path / "wide.parquet").to_pylist()
    assert (line["measure"], line["target"]) == (measure, "a; b")
    assert (line["presence_base"], line["presence_ablated"], line["presence_change"]) == (1.0, 0.2, -0.8)
    assert line["anchor_presence_base"] == 0.03
    assert line["target_accuracy_ablated"] == (0.2 if measure == "clip_accuracy" else 0.1)
    assert (line["verdict"], line["deciding_target"]) == (verdict.PRESENT, "b")


def test_an_imported_delta_has_no_training_record(tmp_path):
    row = write_row(tmp_path, "a")
    del row["training"]
    aggregate_scores(report_spec([row]), tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    (line,) = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    assert line["steps"] is None and line["training_seconds"] is None and line["delta_mb"] == 2.0


def test_a_job_reads_its_rows_where_they_lie_and_the_tables_say_where_they_belong():
    row = {
        "concept": "cat",
        "image": "out/cat.png",
        "scores": "out/scores/cat.parquet",
        "samples": "out/samples/cat.parquet",
        "base": {"cat": "out/base/cat.parquet"},
        "delta": "out/concepts/cat/delta.safetensors",
        "training": None,
    }
    (moved,) = relocate_paths({"rows": [row], "verdict": {}}, "/copies/out")["rows"]
    assert moved["scores"] == "/copies/out/scores/cat.parquet"
    assert moved["base"] == {"cat": "/copies/out/base/cat.parquet"}
    assert moved["delta"] == "/copies/out/concepts/cat/delta.safetensors"
    assert moved["delta_shown"] == row["delta"] and moved["training"] is None
    assert moved["image"] == row["image"]  # the user's own file is no result
    (same,) = relocate_paths({"rows": [row]}, "out")["rows"]
    assert {name: same[name] for name in row} == row
