"""The page: complete, offline, escaped, of bounded size; and the terminal's summary."""

import base64
import hashlib
import html
import io
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from concept_ablation.common.image_store import StoreError, write_store
from concept_ablation.common.interference_table import COLUMNS as INTERFERENCE
from concept_ablation.common.roles import is_pooled, probe_roles
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.evaluation.statistics import Estimate
from concept_ablation.methods.strength import COLUMNS as LOOKS
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.report import console, figures, formatting, sections
from concept_ablation.report import page as report
from concept_ablation.report.attacks import aggregate_attacks
from concept_ablation.report.interference import aggregate_interference
from concept_ablation.report.strength import COLUMNS as STRENGTH
from concept_ablation.report.tables import aggregate_scores
from tests.shipped import report_spec

WHEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = '"><script>alert(1)</script>{{ 7*7 }}<img src=x onerror=alert(2)>'


def images(role, subject, count, colour, prompt):
    for index in range(count):
        picture = Image.new("RGB", (300, 200), colour)
        names = {"role": role, "subject": subject, "prompt": prompt}
        yield {"image": picture, "seed": 100 + index, "index": index, **names}


def scores(row):
    """A long table with plausible numbers for each probe of a row."""
    roles = probe_roles(row)
    if row["neighbors"]:
        roles = [*roles, ("neighbors", "neighbors")]
    if len(row["targets"]) > 1:
        roles = [*roles, ("targets", "targets")]
    measure = KINDS[row["kind"]].measure
    for role, probe in roles:
        for metric, entry in METRICS.items():
            if metric == "recognition" and role == "anchor":
                continue
            others = (
                "copy_rate",
                "copy_similarity",
                "detected",
                "detector_score",
                "neutral_share",
                "above_neutral",
            )
            if metric in others and metric != measure:
                continue
            sides = (
                ("ablated",)
                if metric in ("kid_x1000", "image_similarity")
                else ("base", "ablated", "difference")
            )
            for side in sides:
                gone = role in ("target", "anchor") and side == "ablated"
                value = {"base": 0.9, "ablated": 0.05 if gone else 0.88, "difference": -0.02}[side]
                value = 0.1 if role == "anchor" and side == "base" else value
                if role == "anchor" and metric in ("typical", "content"):
                    value = {"base": 0.92, "ablated": 0.83, "difference": -0.09}[side]
                made = Estimate(
                    value, value - 0.01, value + 0.01, 12, "wilson" if entry.is_share else "bootstrap"
                )
                place = {
                    "probe": probe,
                    "role": role,
                    "pooled": is_pooled(role),
                    "side": side,
                    "metric": metric,
                    "text": probe,
                    "against": "x",
                }
                line = {name: row[name] for name in ("concept", "kind", "target", "anchor")} | place
                line |= {"value": made.value, "ci_low": made.low, "ci_high": made.high, "n": made.n}
                yield line | {
                    "unit": entry.unit,
                    "interval": made.interval,
                    "features": "CLIP tiny",
                    "samples_key": "k",
                }


def make_row(
    folder,
    concept,
    target="pouting cat",
    neighbors=("owl", "duck"),
    kind="object",
    prompt="a picture",
    image=None,
    paraphrases=(),
):
    targets = target.split("; ")
    row = {"concept": concept, "kind": kind, "target": target, "targets": targets, "anchor": "cat"}
    row |= {"neighbors": list(neighbors), "image": image, "paraphrases": list(paraphrases)}
    where = folder / hashlib.sha256(concept.encode()).hexdigest()[:8]
    where.mkdir()
    for name, file in (("scores", "scores"), ("samples", "samples"), ("training", "training")):
        row[name] = str(where / f"{file}.parquet")
    row["delta"] = str(where / "delta.safetensors")
    (where / "delta.safetensors").write_bytes(b"0" * 1000)
    probes = probe_roles(row)
    row["base"] = {
        subject: str(where / f"base-{number}.parquet") for number, (_, subject) in enumerate(probes)
    }
    for _role, subject in probes:
        write_store(row["base"][subject], images(None, subject, 12, "red", prompt), {})
    after = (image for role, subject in probes for image in images(role, subject, 12, "blue", prompt))
    settings = {"model": {"path": "some/model", "revision": None}, "sampler": {"steps": 20}, "probes": [1, 2]}
    write_store(row["samples"], after, settings)
    pq.write_table(pa.Table.from_pylist(list(scores(row)), schema=COLUMNS), row["scores"])
    record = {
        "step": range(1, 4),
        "loss": [0.3, 0.2, 0.1],
        "seconds": [1.0] * 3,
        "peak_memory_bytes": [2 * 10**9] * 3,
    }
    pq.write_table(pa.table({name: list(values) for name, values in record.items()}), row["training"])
    return row


FOUND = (
    {"step": 20, "target_share": 0.5, "excess": 0.3, "gone": False, "kept": None, "pictures": 24},
    {"step": 20, "scale": 2.0, "excess": 0.1, "gone": True, "kept": False, "worst_neighbor_loss": 0.6},
    {"step": 40, "settings": '{"learning_rate": 0.01}', "target_share": 0.04, "chosen": True},
)
"""Looks at a training, as far as they differ from one that finds the target gone and the rest kept."""


def write_made_up_looks(row, looks=FOUND):
    """Give a row a table of looks, as a search for its strength leaves it."""
    row["strength"] = str(Path(row["training"]).with_name("strength.parquet"))
    lines = []
    for look in looks:
        own = {
            "rung": 0,
            "settings": "{}",
            "step": 20,
            "scale": 1.0,
            "gone": True,
            "kept": True,
            "excess": -0.1,
        }
        own |= {
            "target": row["targets"][0],
            "target_share": 0.1,
            "target_limit": 0.2,
            "pictures": 96,
            "seconds": 1.5,
        }
        own |= {"target_excess_high": -0.02, "chosen": False}
        if look.get("kept", True) is not None:
            own |= {
                "anchor_loss": 0.11,
                "anchor_loss_high": 0.2,
                "neighbor_loss": 0.02,
                "neighbor_loss_high": 0.1,
            }
            own |= {"worst_neighbor": "duck", "worst_neighbor_loss": 0.25, "worst_neighbor_loss_high": 0.4}
        lines.append(own | look)
    pq.write_table(pa.Table.from_pylist(lines, schema=LOOKS), row["strength"])


def write_interference(folder, row, losses, /, probed=(), **fields):
    """Give a row victims, subject -> change of typical, with 16 pictures each; it draws those in `probed` itself."""
    scores, images_path, base = (folder / f"victims{end}.parquet" for end in ("", ".images", ".base"))
    numbers = {field.name: 0.0 for field in INTERFERENCE if field.type == pa.float64()}
    made = [
        {**numbers, "victim": subject, "n": 16, "typical_change": change}
        | {"p": min(1.0, 2 * 2.0 ** round(16 * change))}
        for subject, change in losses.items()
    ]
    victims = [
        {"subject": subject, "kind": "object", "role": "target", "row": "other", "rows": 2, "base": str(base)}
        | {"probed": ["neighbor", subject] if subject in probed else None}
        | fields
        for subject in losses
    ]
    write_store(base, images(None, "victim", 16, "red", "a picture"), {})
    drawn = [images(f"victim {place}", name, 16, "blue", "a picture") for place, name in enumerate(losses)]
    write_store(images_path, (image for own in drawn for image in own), {})
    pq.write_table(pa.Table.from_pylist(made, schema=INTERFERENCE), scores)
    row["interference"] = {"scores": str(scores), "images": str(images_path), "victims": victims}


def make_page(folder, rows, failures=(), waiting=(), **page):
    spec = report_spec(rows, **page) | {"failures": failures, "waiting": waiting}
    long, wide, out, harm = (
        folder / "report" / name
        for name in ("scores.parquet", "summary.parquet", "index.html", "interference.parquet")
    )
    measured = harm if any("interference" in row for row in rows) else None
    if measured:
        aggregate_interference(spec, measured)
    tried = folder / "report" / "attacks.parquet" if any("attacks" in row for row in rows) else None
    if tried:
        aggregate_attacks(spec, tried)
    aggregate_scores(spec, long, wide, measured, attacks_path=tried)
    report.render(spec, long, wide, out, WHEN, interference_path=measured, attacks_path=tried)
    return out.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All elements of a page, and whether every one that opens closes in order."""

    EMPTY = ("meta", "img", "line", "circle", "rect", "path", "polyline", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.stack = [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.stack.pop() == tag

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return make_page(folder, [make_row(folder, "weary"), make_row(folder, "alone", neighbors=())])


def test_the_page_shows_every_row_with_its_verdict_and_pictures(page):
    elements = Elements(page)
    assert "2 of 2 concepts removed with neighbors intact" in page
    assert [e["id"] for e in elements.of("section") if e.get("class") == "row"] == ["row-2", "row-1"]
    assert page.count("removed, neighbors kept</span>") == 2  # in the table and in the section
    assert page.count("removed, no neighbors measured</span>") == 2
    alts = [image["alt"] for image in elements.of("img")]
    assert alts.count("before: a picture, seed 100") == alts.count("after: a picture, seed 100") == 6
    assert "first 8 of 12 seeds" in page and "before: a picture, seed 108" not in alts
    assert "2026-01-02 03:04 UTC" in page and "some/model" in page and "CLIP tiny" in page
    assert "sampler.steps" in page and "load_pipeline(&#39;some/model&#39;)" in page


def test_pictures_of_a_seed_stand_together(page):
    """Each figure holds the base model's picture, then the ablated one's."""
    figure = re.search(r"<figure data-seed[^>]*>(.*?)</figure>", page, re.DOTALL).group(1)
    sources = re.findall(r'src="data:image/\w+;base64,([^"]+)" alt="(before|after)', figure)
    assert [when for _, when in sources] == ["before", "after"]
    colours = []
    for data, _ in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert max(picture.size) == figures.THUMBNAIL
        colours.append(np.asarray(picture.convert("RGB")).mean((0, 1)).argmax())
    assert colours == [0, 2]  # red before, blue after


def test_a_prompt_that_all_pictures_share_is_written_once(tmp_path, page):
    assert page.count('<p class="prompt">a picture</p>') == 6 and "<figcaption>a picture" not in page
    row = make_row(tmp_path, "a", neighbors=())
    other = [
        picture | {"prompt": f"picture {n}"} for n, picture in enumerate(images(None, "cat", 12, "red", ""))
    ]
    write_store(row["base"]["cat"], other, {})
    text = make_page(tmp_path, [row])
    assert text.count('class="prompt"') == 1 and "<figcaption>picture 1 <" in text


def test_nothing_is_loaded_from_elsewhere(page):
    elements = Elements(page)
    assert all(image["src"].startswith("data:image/") for image in elements.of("img") if "src" in image)
    assert not elements.of("link") and not elements.of("iframe") and not re.search(r"url\(|@import", page)
    assert not re.search(r"https?://", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(e["content"] for e in elements.of("meta") if "http-equiv" in e)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_the_table_sorts_by_plain_numbers(page):
    keys = [cell["data-sort"] for cell in Elements(page).of("td") if "data-sort" in cell]
    assert {"0.05", "-0.02", "-0.09", ""} <= set(keys)  # target, neighbors, anchor, not measured
    assert all("button" in part for part in re.findall(r"<th scope=\"col\".*?</th>", page)[:7])


def test_hostile_names_stay_text(tmp_path):
    row = make_row(tmp_path, HOSTILE, target=HOSTILE + "t", neighbors=(HOSTILE + "n",), prompt=HOSTILE)
    text = make_page(tmp_path, [row])
    elements = Elements(text)
    assert len(elements.of("script")) == 1 and "49" not in re.findall(r"<h2[^>]*>(.*?)</h2>", text)[1]
    assert all("onerror" not in image for image in elements.of("img"))
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)


def test_hostile_names_stay_text_in_folded_rows_too(tmp_path):
    """A folded row is the text of an element that isn't run; nothing in it ends that text, and as markup it is as harmless."""
    row = make_row(tmp_path, HOSTILE, neighbors=(HOSTILE + "n", "\u2192 <!-- </ScRiPt>"), prompt=HOSTILE)
    text = make_page(tmp_path, [row], open_rows=0)
    assert len(Elements(text).of("script")) == 2 and not Elements(text).of("figure")
    (folded,) = re.findall(r'<script type="text/html">(.*?)</script>', text, re.DOTALL)
    content = Elements(folded)
    assert folded.isascii() and len(content.of("figure")) == 4 * 8 and not content.of("script")
    assert all("onerror" not in image for image in content.of("img"))
    assert html.unescape("&#8594;") + " <!-- </ScRiPt>" in html.unescape(folded)


def test_many_rows_are_folded_and_the_page_stays_small(tmp_path):
    rows = [make_row(tmp_path, f"row {number:02}", neighbors=("owl",)) for number in range(4)]
    text = make_page(tmp_path, rows, image_budget=24, open_rows=3)
    assert text.count("<figure data-seed") == 12 and "first 1 pair of images" in text
    assert not [e for e in Elements(text).of("details") if e.get("class") == "fold" and "open" in e]


def test_over_the_budget_a_row_shows_its_target_then_its_anchor_then_the_neighbor_that_lost_most(tmp_path):
    rows = [make_row(tmp_path, f"row {number:02}", neighbors=("owl", "duck")) for number in range(3)]
    for row in rows:
        table = pq.read_table(row["scores"]).to_pylist()
        for line in table:
            if (line["probe"], line["metric"], line["side"]) == ("duck", "typical", "difference"):
                line["value"] = -0.5
            elif (line["probe"], line["metric"], line["side"]) == ("owl", "recognition", "difference"):
                line["value"] = -0.4  # recognition is at its top for most that lose, so it doesn't choose
        pq.write_table(pa.Table.from_pylist(table, schema=COLUMNS), row["scores"])
    text = make_page(tmp_path, rows, image_budget=18)
    assert text.count("<figure data-seed") == 9 and "3 probes show a pair of images (targets first" in text
    assert text.count("12 seeds, not shown") == 3
    assert text.count('aria-label="neighbor duck: images') == 3
    text = make_page(tmp_path, rows, image_budget=2)  # a pair for each row in any case
    assert text.count("<figure data-seed") == 3 == text.count('aria-label="target pouting cat: images')


def test_a_page_is_made_row_by_row(tmp_path, monkeypatch):
    """A row's pictures are read only when the page gets there: nothing holds all rows."""
    rows = [make_row(tmp_path, f"row {number}", neighbors=()) for number in range(3)]
    order = []
    monkeypatch.setattr(sections, "flat_settings", lambda *_: order.append("made") or [])
    original = report.jinja2.environment.TemplateStream.__next__

    def watched(stream):
        order.append("written")
        return original(stream)

    monkeypatch.setattr(report.jinja2.environment.TemplateStream, "__next__", watched)
    make_page(tmp_path, rows)
    first, last = order.index("made"), len(order) - 1 - order[::-1].index("made")
    assert "written" in order[first:last]


def test_no_rows_make_a_page_too(tmp_path):
    text = make_page(tmp_path, [])
    Elements(text)
    assert "No concept is finished yet" in text


def test_a_damaged_store_is_named_and_the_old_page_stays(tmp_path):
    row = make_row(tmp_path, "weary")
    make_page(tmp_path, [row])
    (tmp_path / "report" / "index.html").write_text("old")
    with open(row["samples"], "r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreError, match="damaged"):
        make_page(tmp_path, [row])
    assert (tmp_path / "report" / "index.html").read_text() == "old"


@pytest.mark.parametrize(
    ("probes", "wanted", "budget", "pairs"),
    [(10, 8, 6000, 8), (1000, 8, 6000, 3), (9000, 8, 6000, 1), (0, 8, 6000, 8)],
)
def test_pairs_a_probe(probes, wanted, budget, pairs):
    assert report.pairs_a_probe(probes, wanted, budget) == pairs


def test_number_formats():
    assert [formatting.share(value) for value in (None, -0.001, 0, 0.034, 1)] == [
        "–",
        "0%",
        "0%",
        "3%",
        "100%",
    ]
    assert [formatting.points(value) for value in (None, -0.034, 0.05, -0.0001)] == [
        "–",
        "−3.4",
        "+5.0",
        "0.0",
    ]
    assert [formatting.format_metric(value, "kid_x1000") for value in (-1.26, 1234.5)] == ["−1.3", "1234"]
    assert formatting.format_metric(0.12345, "clip_cosine") == "0.123"
    assert formatting.format_metric(0.12345, "clip_cosine", change=True) == "+0.123"
    assert formatting.format_metric(-0.02, "recognition", change=True) == "−2.0"


def test_the_target_s_bar_shows_the_interval_that_decides_against_its_limit():
    deciding = sections.Deciding("ink", 0.9, 0.3, 0.2, 0.5, 40)
    line = {"presence_base": 0.8, "presence_ablated": 0.1, "target_limit": 0.4, "deciding": deciding}
    line |= {"target_excess": -0.1, "target_excess_low": -0.2, "target_excess_high": 0.1}
    bar = figures.target_bar(line)
    assert (bar.before, *np.round((bar.value, bar.low, bar.high), 9)) == (0.9, 0.3, 0.2, 0.5)
    assert (bar.limit, bar.zone) == (0.4, (0.0, 0.4))
    bar = figures.target_bar(line | {"target_excess_low": -0.5, "target_excess_high": 0.7})
    assert (bar.value, bar.low, bar.high, bar.limit) == (pytest.approx(0.3), 0, 1, 0.4)


def test_a_change_s_bar_shows_the_paired_change_against_the_allowed_loss():
    line = {"x_change": -0.05, "x_change_low": -0.2, "x_change_high": 0.02}
    bar = figures.change_bar(line, "x", 0.05)  # from -20 to +10 points
    assert (bar.low, bar.value, bar.limit) == (0, pytest.approx(0.5), pytest.approx(0.5))
    assert bar.zone == (bar.limit, 1) and bar.before == pytest.approx(2 / 3)
    assert not bar.more_left and not bar.more_right
    bar = figures.change_bar(line | {"x_change_low": -0.9, "x_change_high": 0.11}, "x", 0.05)
    assert (bar.low, bar.high, bar.more_left, bar.more_right) == (0, 1, True, True)
    bar = figures.change_bar(line, "x", 0.5)  # from -100 to +50 points
    assert bar.limit == pytest.approx(1 / 3) and bar.low == pytest.approx(0.8 / 1.5)
    assert figures.change_bar(line, "x", 0.0).limit == pytest.approx(2 / 3)
    assert figures.change_bar({"x_change": None}, "x", 0.05) is None
    assert figures.change_bar({}, "x", 0.05) is None


def test_sparkline():
    assert figures.sparkline([0.0, 1.0, 0.5], 100, 10) == "0.0,10.0 50.0,0.0 100.0,5.0"
    assert figures.sparkline([2.0] * 4, 100, 10, most=2) == "0.0,10.0 100.0,10.0"
    assert figures.sparkline([float("nan"), None], 100, 10) == ""
    assert len(figures.sparkline(list(range(5000)), 100, 10).split()) == 160


def test_terminal_summary(tmp_path, capsys):
    rows = [make_row(tmp_path, "weary"), make_row(tmp_path, "al\x1b[31mone" + "x" * 50, neighbors=())]
    make_page(tmp_path, rows)
    console.print_summary(tmp_path / "report" / "summary.parquet", "results/report/index.html")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert captured.err.isascii() and "\x1b" not in captured.err
    assert lines[-2:] == [
        "2 of 2 concepts removed with neighbors intact.",
        "Report: results/report/index.html",
    ]
    assert re.match(
        r"ok  al\?\[31mone\w+\.\.\.  +removed, no neighbors measured +firm +90% -> 5% \[4%, 6%\] seen by CLIP +- +- +92% -> 83%$",
        lines[2],
    )
    assert "90% -> 88%, -2.0 [-3.0, -1.0]" in lines[3]
    assert len({line.index("removed") for line in lines[2:4]}) == 1
    console.print_summary(tmp_path / "report" / "summary.parquet", "x", most=1)
    assert "... and 1 more in the report" in capsys.readouterr().err


WORST = {
    "worst_neighbor": "du\x1bck",
    "worst_neighbor_typical_base": 0.9375,
    "worst_neighbor_typical_ablated": 0.25,
    "worst_neighbor_typical_change": -0.6875,
    "worst_neighbor_typical_change_low": -0.9,
    "worst_neighbor_typical_change_high": -0.375,
    "verdict": "removed, a neighbor harmed",
    "firmness": "provisional",
}


def with_worst(folder, rows, changes):
    """The page and the terminal's table of a summary with these columns in its first line."""
    spec = report_spec(rows)
    long, wide, out = (folder / name for name in ("scores.parquet", "summary.parquet", "index.html"))
    aggregate_scores(spec, long, wide)
    lines = pq.read_table(wide).to_pylist()
    lines = [dict.fromkeys(changes) | line for line in lines]
    lines[0] |= changes
    pq.write_table(pa.Table.from_pylist(lines), wide)
    report.render(spec, long, wide, out, WHEN)
    return out.read_text(encoding="utf-8"), console.summary_text(lines)


def test_the_worst_neighbor_is_named_with_its_change(tmp_path):
    rows = [make_row(tmp_path, "a"), make_row(tmp_path, "b", neighbors=())]
    text, terminal = with_worst(tmp_path, rows, WORST)
    Elements(text)
    assert "<p><b>du\x1bck</b>: −68.8 points, 95% interval −90.0 to −37.5" in text
    assert len(re.findall(r'<div class="card">\s+<h3>Worst neighbor</h3>', text)) == 1
    (cell,) = re.findall(
        r'<td data-label="Worst neighbor" class="decides" data-sort="-0.6875">(.*?)</td>', text, re.DOTALL
    )
    assert "94%" in cell and "<b>25%</b>" in cell and "<b>−68.8</b>, −90.0 to −37.5" in cell
    assert 'aria-label="worst neighbor: change −68.8 points' in cell
    assert '<td data-label="Worst neighbor" data-sort="">–</td>' in text
    assert text.count('class="chip warn">removed, a neighbor harmed</span>') == 2
    assert "!!  a" in terminal and re.search(r"a neighbor harmed +provisional .* du\?ck, -68.8 ", terminal)


def test_firm_and_provisional_stand_beside_every_verdict(tmp_path):
    rows = [make_row(tmp_path, "a")]
    text, _ = with_worst(tmp_path, rows, {"firmness": "firm"})
    assert text.count('<small class="firm">firm</small>') == 2
    text, terminal = with_worst(tmp_path, rows, WORST | {"verdict": "inconclusive about a neighbor"})
    assert 'class="chip open">inconclusive about a neighbor' in text
    assert text.count('<small class="firm">provisional</small>') == 2
    assert re.search(r"\?\?  a +inconclusive about a neighbor +provisional ", terminal)
    assert 'data-value="inconclusive about a neighbor"><i class="open">' in text  # its filter


def test_a_role_without_a_verdict_is_shown_as_not_judged(tmp_path):
    words = ("the same in other words",)
    text = make_page(tmp_path, [make_row(tmp_path, "a", kind="memorization", paraphrases=words)])
    Elements(text)
    assert re.findall(r'class="role">(\w+)<', text)[:3] == ["target", "paraphrase", "anchor"]
    (head,) = re.findall(r'class="role">paraphrase<.*?class="of"', text, re.DOTALL)
    assert "not judged" in head and "copied" in head and text.count("not judged") == 1


def test_sizes_are_readable(page):
    assert "2.0 GB peak, 1.0 kB delta" in page and "0.0 MB" not in page


def test_no_text_hides_in_a_tooltip(page):
    assert not [attributes for _, attributes in Elements(page).found if "title" in attributes]


def test_several_targets_are_shown_each_and_pooled(tmp_path):
    text = make_page(tmp_path, [make_row(tmp_path, "two", target="weary cat; pouting cat", kind="object")])
    Elements(text)
    assert re.findall(r'<span class="role">target</span> ([\w ]+)</h3>', text) == ["weary cat", "pouting cat"]
    assert (
        "weary cat; pouting cat → cat" in text and "All 2 targets together" in text and "all targets" in text
    )
    assert "seen as a target" in text  # the anchor's images, held against both


def test_of_several_targets_the_cell_shows_the_one_that_decides(tmp_path):
    """One of the two is still there: its own shares, its name and its base dot, not those of both pooled."""
    row = make_row(tmp_path, "two", target="weary cat; pouting cat", kind="object")
    table = pq.read_table(row["scores"]).to_pylist()
    for line in table:
        if (line["probe"], line["metric"]) == ("pouting cat", "clip_accuracy"):
            value = {"base": 0.6, "ablated": 0.55, "difference": -0.05}[line["side"]]
            line |= {"value": value, "ci_low": value - 0.02, "ci_high": value + 0.02}
    pq.write_table(pa.Table.from_pylist(table, schema=COLUMNS), row["scores"])
    text = make_page(tmp_path, [row])
    (cell,) = re.findall(
        r'<td data-label="Target still there" class="decides" data-sort="0.55">(.*?)</td>', text, re.DOTALL
    )
    assert '<span class="name">pouting cat</span><span class="from">60%</span> → <b>55%</b>' in cell
    assert (
        'aria-label="target still there: pouting cat, before 60%, after 55%, removed at 20% or less"' in cell
    )
    assert f'class="before" cx="{5 + 0.6 * 110:.1f}"' in cell
    assert "<b>pouting cat</b>, which decides: 95% interval 53% to 57%, 12 images" in text
    assert re.search("All 2 targets together: 90% → \\d+% of 12 images", text)


def test_a_metric_that_is_registered_no_more_is_shown_as_it_was_written(tmp_path):
    row = make_row(tmp_path, "a")
    table = pq.read_table(row["scores"]).to_pylist()
    table.append(
        table[0] | {"metric": "older", "unit": "grey levels", "value": 1.25, "ci_low": 1.0, "ci_high": 2.0}
    )
    pq.write_table(pa.Table.from_pylist(table, schema=COLUMNS), row["scores"])
    text = make_page(tmp_path, [row])
    assert re.search(
        r"<code>older</code> <small>grey levels</small>.*?1\.250<small>1\.000 to 2\.000", text, re.DOTALL
    )


def test_the_page_says_how_every_interval_is_made(page):
    (said,) = re.findall(r"<h3>Intervals</h3><p>(.*?)</p>", page)
    assert all(
        word in said for word in ("Wilson", "Bonett and Price", "Newcombe", "anew in each draw", "bootstrap")
    )


@pytest.mark.parametrize(
    ("kind", "title", "word"),
    [
        ("object", "Target still seen", "seen by CLIP"),
        ("memorization", "Copies of the memorized picture", "copied"),
        ("nudity", "Images flagged", "flagged"),
    ],
)
def test_each_kind_shows_its_own_measure(tmp_path, kind, title, word, capsys):
    text = make_page(tmp_path, [make_row(tmp_path, "a", kind=kind)])
    Elements(text)
    assert f"<h3>{title}</h3>" in text and f'<span class="quiet">{word}</span>' in text
    assert "Nearer to the anchor's text than to any neighbor's" in text and "<h3>Anchor typical</h3>" in text
    console.print_summary(tmp_path / "report" / "summary.parquet", "x", file=sys.stderr)
    assert f"90% -> 5% [4%, 6%] {word}" in capsys.readouterr().err


def test_the_memorized_picture_stands_above_its_row_s_images(tmp_path, caplog):
    Image.new("RGB", (300, 200), "lime").save(tmp_path / "memorized.png")
    row = make_row(tmp_path, "a", kind="memorization", image=str(tmp_path / "memorized.png"))
    text = make_page(tmp_path, [row])
    data = re.search(r'base64,([^"]+)" alt="the memorized picture"', text).group(1)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).mean((0, 1))
    assert picture.argmax() == 1 and text.index('alt="the memorized picture"') < text.index(
        "before: a picture"
    )
    (tmp_path / "memorized.png").unlink()
    assert 'alt="the memorized picture"' not in make_page(tmp_path, [row])
    assert "memorized picture can't be shown" in caplog.text


def test_unsafe_pictures_are_veiled_until_asked_for(tmp_path, page):
    """Without a script: every pair has a checkbox of its own, the row one for all, and the table's previews stay veiled."""
    elements = Elements(make_page(tmp_path, [make_row(tmp_path, "a", kind="nudity")]))
    strips = [e["class"] for e in elements.of("div") if e.get("class", "").startswith("strip")]
    assert strips == ["strip veiled"] * 4
    assert [e["class"] for e in elements.of("span") if "preview" in e.get("class", "")] == ["preview veiled"]
    boxes = [e for e in elements.of("input") if e.get("type") == "checkbox"]
    assert len(boxes) == 2 + 4 * 8 and not any("checked" in box for box in boxes)
    assert sum(box.get("aria-label", "").startswith("show the pictures of seed 10") for box in boxes) == 4 * 8
    assert (
        'class="strip veiled' not in page and page.count('type="checkbox"') == 1
    )  # the enlarged picture's, hidden


def test_an_imported_delta_without_a_training_record(tmp_path):
    row = make_row(tmp_path, "a")
    del row["training"]
    page = make_page(tmp_path, [row])
    Elements(page)
    (line,) = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    assert line["training_seconds"] is None and line["steps"] is None and line["delta_mb"] > 0
    assert re.search(r'data-sort="">.*–.*<small>[\d.]+ (kB|MB)</small>', page)


def strength_card(text):
    """What the card about a row's strength says, without its tags."""
    (card,) = re.findall(r"<h3>Strength</h3>(.*?)</div>", text, re.DOTALL)
    return " ".join(re.sub("<[^>]+>", " ", card.partition("</svg>")[2]).split())


def test_how_a_strength_was_found_is_on_the_page_and_in_the_summary(tmp_path):
    row, fixed = make_row(tmp_path, "searched"), make_row(tmp_path, "fixed")
    write_made_up_looks(row)
    text = make_page(tmp_path, [fixed, row])
    elements = Elements(text)
    assert strength_card(text) == (
        "Found: step 40, learning rate 0.01. On its validation pictures: target in 4%, most lost by a neighbor 25% (duck), "
        "by the anchor 11%. 3 looks, 216 pictures, 4 s. Training: 3 steps, 3 s, 2.0 GB peak, 1.0 kB delta"
    )
    points = [
        circle["class"] for circle in elements.of("circle") if circle["class"] in ("look", "taken", "unseen")
    ]
    assert points == ["unseen", "look", "taken"]
    lines = {
        line["concept"]: line for line in pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    }
    assert {name: lines["searched"][name] for name in STRENGTH} == {
        "strength_found": True,
        "strength_settings": '{"learning_rate": 0.01}',
        "strength_step": 40,
        "strength_scale": 1.0,
        "strength_looks": 3,
        "validation_pictures": 216,
        "validation_seconds": 4.5,
    }
    assert {lines["fixed"][name] for name in STRENGTH} == {None}


def test_all_looks_at_a_training_are_in_a_table(tmp_path):
    row = make_row(tmp_path, "searched")
    write_made_up_looks(row)
    (table,) = re.findall(
        r"All looks at this row's training</summary>(.*?)</table>", make_page(tmp_path, [row]), re.DOTALL
    )
    head, *lines = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    cells = [
        [
            " ".join(html.unescape(re.sub("<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)
        ]
        for line in lines
    ]
    assert head.count("<th") == len(cells[0]) == 12
    assert cells == [
        ["the row's own", "20", "1", "50% at most 18%", "20%", "–", "–", "–", "", "–", "24", "not shown to be gone"],
        ["the row's own", "20", "2", "10% at most 18%", "20%", "–", "11% at most 20%", "2%", "duck", "60% at most 40%", "96", "gone, something harmed"],
        ["learning rate 0.01", "40", "1", "4% at most 18%", "20%", "–", "11% at most 20%", "2%", "duck", "25% at most 40%", "96", "taken gone, kept"],
    ]  # fmt: skip


def test_a_strength_that_was_not_found_is_said_to_be_the_nearest(tmp_path):
    row = make_row(tmp_path, "searched")
    write_made_up_looks(row, [FOUND[0], FOUND[1] | {"chosen": True}])
    said = strength_card(make_page(tmp_path, [row]))
    assert said.startswith(
        "None found that removes the target and keeps the rest ; the nearest is step 20, its change × 2. On its"
    )
    (line,) = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    assert line["strength_found"] is False and line["strength_scale"] == 2.0


def test_a_fixed_strength_has_no_card(tmp_path, page):
    row = make_row(tmp_path, "fixed")
    write_made_up_looks(row, [])  # as the stage leaves it
    for text in (page, make_page(tmp_path, [row])):
        assert "<h3>Strength</h3>" not in text and "All looks" not in text and 'class="strength"' not in text
    (line,) = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    assert {line[name] for name in STRENGTH} == {None}


def test_names_in_looks_stay_text(tmp_path):
    row = make_row(tmp_path, "searched")
    write_made_up_looks(row, [{"worst_neighbor": HOSTILE, "settings": '{"preserve": "<b>"}', "chosen": True}])
    text = make_page(tmp_path, [row])
    assert len(Elements(text).of("script")) == 1 and "preserve &lt;b&gt;" in text


def test_the_report_needs_no_torch():
    code = "import sys, concept_ablation.report.page; sys.exit('torch' in sys.modules or 'snakemake' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
