"""The verdict rule, and the two tables made from rows' scores."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation import metrics, tables
from concept_ablation.tables import COLUMNS, TableError, Thresholds, aggregate_scores, judge
from concept_ablation.training import StepRecord, write_records


def summary(target=(0.95, 0.05), n=40, loss=0.0, losses_n=100, anchor=0.1):
    """The columns that a verdict reads, from shares: target before and after, neighbors' loss."""

    def share(value, count):
        return metrics.proportion(np.repeat([1.0, 0.0], [round(value * count), count - round(value * count)]))

    change = np.zeros(losses_n)
    change[: round(abs(loss) * losses_n)] = -np.sign(loss)
    estimates = {
        "target_accuracy_base": share(target[0], n),
        "target_accuracy_ablated": share(target[1], n),
        "anchor_accuracy_base": share(anchor, 40),
        "neighbor_recognition_change": metrics.paired_proportion_difference(change, np.zeros(losses_n)),
    }
    columns = {}
    for name, estimate in estimates.items():
        columns |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return columns


@pytest.mark.parametrize(
    ("columns", "verdict", "settled"),
    [
        (summary(losses_n=1000), tables.KEPT, True),
        (summary(target=(0.95, 0.2)), tables.KEPT, False),  # "at most" holds the limit; its interval does not
        (summary(loss=0.05), tables.KEPT, False),  # a loss of exactly five points is allowed
        (summary(loss=0.06), tables.HARMED, False),
        (summary(loss=0.3), tables.HARMED, True),
        (summary(target=(0.95, 0.9)), tables.PRESENT, True),
        (summary(target=(0.95, 0.25), n=40), tables.PRESENT, False),
        (summary(target=(1, 0.5), n=6), tables.TOO_WIDE, False),
        (summary(target=(1, 1), n=6), tables.PRESENT, True),  # few images, but they leave no doubt
        (summary(losses_n=6, loss=1 / 6), tables.TOO_WIDE, False),
        (summary(target=(0.3, 0)), tables.NOT_SHOWN, False),
    ],
)
def test_verdicts_of_objects(columns, verdict, settled):
    result = judge("object", columns, Thresholds())
    assert (result.verdict, result.settled) == (verdict, settled)
    assert result.target_limit == 0.2


def test_a_style_may_stay_as_visible_as_it_is_without_being_asked_for():
    columns = summary(target=(1, 0.3), anchor=0.25)
    assert judge("object", columns, Thresholds()).verdict == tables.PRESENT
    style = judge("style", columns, Thresholds())
    assert style.verdict == tables.KEPT and style.target_limit == pytest.approx(0.35)


def test_a_row_without_neighbors_is_not_called_harmless():
    columns = summary()
    for name in ("", "_low", "_high"):
        columns["neighbor_recognition_change" + name] = None
    result = judge("object", columns, Thresholds())
    assert result.verdict == tables.ALONE and result.kept is None and result.removed


def test_thresholds_come_from_the_config():
    assert judge("object", summary(target=(1, 0.3)), Thresholds(target_max=0.4)).verdict == tables.KEPT
    assert tables.read_thresholds([]) == Thresholds()
    assert tables.read_thresholds({"rows": [], "verdict": {"target_max": 0.1}}).target_max == 0.1
    with pytest.raises(ValueError, match="unknown targets_max .allowed: target_max"):
        tables.read_thresholds({"rows": [], "verdict": {"targets_max": 0.1}})


def score_line(concept, role, metric, model, value, low=None, high=None):
    line = dict.fromkeys(COLUMNS.names, "") | {
        "concept": concept,
        "role": role,
        "metric": metric,
        "model": model,
    }
    return line | {"value": value, "ci_low": value if low is None else low, "ci_high": high or value, "n": 40}


def write_row(folder, concept, kind="object"):
    lines = [
        score_line(concept, "target", "clip_accuracy", "base", 1.0, 0.9, 1.0),
        score_line(concept, "target", "clip_accuracy", "ablated", 0.0, 0.0, 0.1),
        score_line(concept, "anchor", "clip_accuracy", "base", 0.1),
        score_line(concept, "neighbors", "recognition", "difference", -0.01, -0.04, 0.02),
        score_line(concept, "neighbors", "kid_x1000", "ablated", 3.5, 1.0, 9.0),
        score_line(concept, "target", "clip_cosine", "ablated", 0.3),
    ]
    scores, training, delta = (folder / f"{concept}.{end}" for end in ("scores", "training", "delta"))
    pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), scores)
    write_records(
        training, [StepRecord(i, 0.2, np.nan, 1e-4, 1.0, 0.5 / i, 6_000_000 * i) for i in (1, 2)], {}
    )
    delta.write_bytes(b"0" * 2_000_000)
    names = {
        "concept": concept,
        "kind": kind,
        "target": concept,
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
    aggregate_scores({"rows": rows}, tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    wide = pq.read_table(tmp_path / "summary.parquet")
    assert wide.schema.names == tables.SUMMARY.names
    first, second = wide.to_pylist()
    assert [first["concept"], second["concept"]] == [
        'odd, "name"',
        "weary cat",
    ]  # sorted, whatever the order given
    assert (second["verdict"], second["removed"], second["kept"], second["settled"]) == (
        tables.KEPT,
        True,
        True,
        True,
    )
    assert second["neighbors"] == "owl; duck"
    assert (second["target_accuracy_ablated"], second["target_accuracy_ablated_high"]) == (0.0, 0.1)
    assert (second["neighbor_kid_x1000"], second["neighbor_kid_x1000_high"]) == (3.5, 9.0)
    assert (second["steps"], second["training_seconds"], second["peak_memory_mb"]) == (2, 0.75, 12.0)
    assert (second["delta_mb"], second["target_images"]) == (2.0, 40)
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 12
    import pandas as pd

    for name in ("scores", "summary"):
        copy, original = pd.read_csv(tmp_path / f"{name}.csv"), pq.read_table(tmp_path / f"{name}.parquet")
        assert list(copy.columns) == original.schema.names and len(copy) == original.num_rows
        assert copy.concept.tolist() == original.column("concept").to_pylist()


def test_tables_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = [write_row(tmp_path, "a"), write_row(tmp_path, "b")]
    for number, given in enumerate([rows, rows[::-1]]):
        aggregate_scores(given, tmp_path / f"scores{number}.parquet", tmp_path / f"summary{number}.parquet")
    for name in ("scores", "summary"):
        for end in ("parquet", "csv"):
            first, second = (tmp_path / f"{name}{number}.{end}" for number in (0, 1))
            assert first.read_bytes() == second.read_bytes()


def test_no_rows_give_empty_tables(tmp_path):
    aggregate_scores([], tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    assert pq.read_table(tmp_path / "summary.parquet").num_rows == 0


def test_damaged_and_foreign_scores_are_named(tmp_path):
    row = write_row(tmp_path, "a")
    for content, says in [(b"PAR1 broken", "can't be read"), (None, "not this version's")]:
        if content is None:
            pq.write_table(pa.table({"x": [1]}), row["scores"])
        else:
            (tmp_path / "a.scores").write_bytes(content)
        with pytest.raises(TableError, match=says):
            aggregate_scores([row], tmp_path / "scores.parquet", tmp_path / "summary.parquet")
    assert not (tmp_path / "scores.parquet").exists()
