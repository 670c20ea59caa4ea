"""The registry of metrics: every entry is described, and a new one is a file and a line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from concept_ablation.common.image_store import write_store
from concept_ablation.common.roles import probe_roles
from concept_ablation.evaluation.image_models import ImageModels
from concept_ablation.evaluation.metrics.base import FeatureMetric, ImageMetric, PairMetric, RowMetric
from concept_ablation.evaluation.scoring import score_concept
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.report.page import render
from concept_ablation.report.summary import FORMS, ROLES, summary_schema
from concept_ablation.report.tables import aggregate_scores
from tests.shipped import report_spec
from tests.tiny_clip import make_tiny_clip

BRIGHTNESS = """
import numpy as np

from concept_ablation.evaluation.metrics.base import ImageMetric


class Brightness(ImageMetric):
    name = "brightness"
    unit = "grey levels"
    help = "The mean grey value of a picture, 0 (black) to 255 (white)."
    good_kept = "unchanged"
    {summary}

    def read(self, store, models):
        return np.array([np.asarray(picture.convert("L")).mean() for picture in store.images()])

    def decimals(self, value):
        return 1


METRIC = Brightness()
"""
DARKENING = """
import numpy as np

from concept_ablation.evaluation.metrics.base import PairMetric


class Darkening(PairMetric):
    name = "darkening"
    unit = "grey levels"
    help = "How many grey levels darker the ablated model's picture of a seed is."
    roles = ("target",)

    def read(self, base, ablated, models):
        grey = [[np.asarray(one.convert("L")).mean() for one in store.images()] for store in (base, ablated)]
        return np.subtract(*grey)


METRIC = Darkening()
"""
SUBJECTS = {"targets": ["pouting cat"], "anchor": "cat", "neighbors": ["owl", "duck"]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Writes a metric's file and enters it into the registry, for one test."""

    def register(name, code):
        (tmp_path / f"toy_{name}.py").write_text(code)
        monkeypatch.setitem(METRICS.targets, name, f"toy_{name}:METRIC")

    monkeypatch.syspath_prepend(tmp_path)
    yield register
    for module in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[module]
        METRICS._loaded.pop(module.removeprefix("toy_"), None)


def pictures(role, subject, grey):
    for index in range(6):
        picture = Image.new("L", (16, 16), grey + index).convert("RGB")
        place = {"role": role, "subject": subject, "prompt": subject, "seed": index, "index": index}
        yield {"image": picture, **place}


def make_report(folder, clip):
    """Scores, tables and page of one row whose target got darker by 50 grey levels; returns both tables and the page."""
    names = {"concept": "cat-1", "kind": "object", **SUBJECTS}
    probes = probe_roles(names)
    ablated = (
        row for role, subject in probes for row in pictures(role, subject, 50 if role == "target" else 100)
    )
    write_store(folder / "samples.parquet", ablated, {})
    base = {subject: str(folder / f"{subject}.parquet") for _, subject in probes}
    for subject, path in base.items():
        write_store(path, pictures(None, subject, 100), {})
    spec = names | {"samples": "k", "scorer": {"model": clip, "pretrained": None}}
    spec["texts"] = {subject: f"a {subject}" for subject in base}
    spec["statistics"] = {"bootstrap": 20, "confidence": 0.95, "seed": 0}
    score_concept(spec, folder / "samples.parquet", list(base.values()), folder / "one.parquet")
    files = {
        name: str(folder / f"{file}.parquet") for name, file in (("scores", "one"), ("samples", "samples"))
    }
    row = names | files | {"target": "pouting cat", "base": base, "delta": "none"}
    tables = folder / "scores.parquet", folder / "summary.parquet"
    aggregate_scores(report_spec([row]), *tables)
    render(report_spec([row]), *tables, folder / "index.html")
    long, wide = (pq.read_table(table).to_pylist() for table in tables)
    return long, wide, (folder / "index.html").read_text()


def test_a_new_metric_is_a_file_and_a_line(register, clip, tmp_path):
    register("brightness", BRIGHTNESS.format(summary=""))
    long, wide, page = make_report(tmp_path, clip)
    found = {(line["role"], line["side"]): line for line in long if line["metric"] == "brightness"}
    target = found["target", "difference"]
    assert (target["value"], target["n"], target["unit"], target["interval"]) == (
        -50,
        6,
        "grey levels",
        "bootstrap",
    )
    assert (
        found["neighbors", "base"]["value"] == pytest.approx(102.5)
        and found["anchor", "base"]["features"] == ""
    )
    table = page[page.index("All scores of this row") :]
    assert "<code>brightness</code> <small>grey levels</small>" in table and "−50.0" in table
    assert "The mean grey value of a picture" in page and "What stays: unchanged." in page
    assert not [name for name in wide[0] if "brightness" in name]


def test_a_new_metric_is_in_the_summary_if_it_says_so(register, clip, tmp_path):
    before = summary_schema().names
    register("brightness", BRIGHTNESS.format(summary='summary = {"target": "target_brightness"}'))
    _, wide, _ = make_report(tmp_path, clip)
    assert wide[0]["target_brightness_base"] == pytest.approx(102.5)
    assert (wide[0]["target_brightness_change"], wide[0]["target_brightness_change_low"]) == (-50, -50)
    assert [name for name in summary_schema().names if "brightness" not in name] == before


def test_a_metric_of_pairs_compares_both_models_pictures(register, clip, tmp_path):
    register("darkening", DARKENING)
    long, _, page = make_report(tmp_path, clip)
    lines = [line for line in long if line["metric"] == "darkening"]
    assert [(line["role"], line["side"], line["value"], line["n"]) for line in lines] == [
        ("target", "ablated", 50, 6)
    ]
    assert "grey levels darker" in page


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_described(name):
    metric = METRICS[name]
    assert metric.name == name and metric.unit and metric.help.endswith(".")
    assert isinstance(metric, FeatureMetric | ImageMetric | PairMetric | RowMetric)
    assert set(metric.summary) <= set(ROLES) and metric.summary_form in FORMS
    assert metric.is_share or metric.interval != "share"
    report = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in report, "docs/report.md defines every metric"


def test_the_metrics_that_decide_have_words_for_it():
    for measure in {kind.measure for kind in KINDS.values()}:
        assert METRICS[measure].label and METRICS[measure].shows_target and METRICS[measure].is_share
        assert all(kind.measure != measure or METRICS[measure].applies(kind) for kind in KINDS.values())


def test_the_descriptions_need_no_torch():
    code = "import sys; from concept_ablation.registries import METRICS; list(METRICS.values()); "
    code += "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_copies_of_a_store_are_looked_for_once():
    """Two metrics ask for the same similarities; the descriptor sees each picture once."""
    seen = []

    class Copies:
        def similarity(self, images, batch_size):
            seen.append(batch_size)
            return np.array([0.2, 0.8])

        def is_copy(self, similarity):
            return similarity > 0.5

    models = ImageModels({}, scorer=None, batch_size=3)
    models.__dict__["copies"] = Copies()

    class Store:
        def images(self):
            return iter(())

    store = Store()
    assert METRICS["copy_rate"].read(store, models).tolist() == [0, 1]
    assert METRICS["copy_similarity"].read(store, models).tolist() == [0.2, 0.8] and seen == [3]
    METRICS["copy_rate"].read(Store(), models)
    assert len(seen) == 2
