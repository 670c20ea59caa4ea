"""What the page says of a row first: how it stands, what decides it, how many more pictures would settle it, what changed since."""

import math
import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from concept_ablation import verdict
from concept_ablation.common.roles import probe_roles
from concept_ablation.evaluation.image_record import write_record
from concept_ablation.evaluation.statistics import proportion
from concept_ablation.report.changes import ChangesError, read_changes
from concept_ablation.report.handover import card_command, link_to
from concept_ablation.report.overview import overview_figure, overview_points
from concept_ablation.report.pictures import badge, read_record, worst_first
from concept_ablation.report.sections import Deciding
from concept_ablation.report.triage import count_states, pictures_needed, rounded_up, standing, state_of
from concept_ablation.verdict import Decision
from tests.shipped import thresholds
from tests.test_report import Elements, make_page, make_row

IMAGES = {"target": 40, "neighbor": 64, "worst_neighbor": 16, "anchor": 24}


def line(
    name="a", excess=(-0.1, -0.18, -0.02), neighbors=(0.0, -0.04, 0.04), worst=(-0.1, -0.3, 0.1), **more
):
    """A summary's line with these values and intervals; the verdict is `decide`'s."""
    found = {
        "concept": name,
        "anchor": "cat",
        "target_limit": 0.2,
        "deciding_target": "fox",
        "worst_neighbor": "dog",
    }
    columns = {"neighbor_recognition_change": neighbors, "worst_neighbor_typical_change": worst}
    columns |= {"anchor_typical_change": (0.0, -0.1, 0.1), "target_excess": excess}
    for column, values in columns.items():
        found |= {f"{column}{end}": value for end, value in zip(("", "_low", "_high"), values, strict=True)}
    shares = (0.2 + value for value in excess)
    decided = verdict.decide("object", [verdict.Presence("fox", 0.95, *shares)], found, thresholds())
    return found | {"verdict": decided.verdict, "firmness": decided.firmness} | more


FIRM = line("firm")
OPEN = line("open", neighbors=(0.0, -0.08, 0.08))
HARMED = line("harmed", worst=(-0.8, -0.95, -0.6))
PRESENT = line("present", excess=(0.5, 0.4, 0.6))
PERHAPS = line("perhaps present", excess=(0.05, -0.05, 0.2))


def test_every_row_stands_in_one_state_and_the_worst_come_first():
    lines = [FIRM, OPEN, HARMED, PRESENT, PERHAPS]
    assert [state_of(one) for one in lines] == ["firm", "provisional", "failed", "failed", "failed"]
    assert count_states(lines) == {"failed": 3, "provisional": 1, "firm": 1}
    random.shuffle(lines)
    lines.sort(key=lambda one: standing(one, thresholds(), IMAGES).order)
    assert [one["concept"] for one in lines] == ["present", "perhaps present", "harmed", "open", "firm"]


@pytest.mark.parametrize(
    ("row", "about", "more"),
    [(FIRM, "target", None), (HARMED, "worst neighbor", None), (PRESENT, "target", None), (OPEN, "neighbors", 100)],
)  # fmt: skip
def test_the_value_that_decides_a_row_is_named_with_the_pictures_that_are_missing(row, about, more):
    found = standing(row, thresholds(), IMAGES)
    assert (found.deciding.about, found.more) == (about, more)
    assert (found.open is None) == (row["firmness"] == "firm")


def test_pictures_needed_grow_with_the_square_of_the_interval_s_reach():
    # 64 pictures reach 8 points, the limit is 5 away: 64 (8 / 5)^2 = 163.84 would reach it.
    assert pictures_needed(Decision.of(0.0, -0.08, 0.08, -0.05, "at least"), 64) == 164 - 64
    assert (
        pictures_needed(Decision.of(0.25, 0.19, 0.33, 0.2, "at most"), 25)
        == math.ceil(25 * (0.06 / 0.05) ** 2) - 25
    )
    assert pictures_needed(Decision.of(0.1, 0.0, 0.15, 0.2, "at most"), 25) == 0  # settled
    assert pictures_needed(Decision.of(0.2, 0.1, 0.3, 0.2, "at most"), 25) is None  # on its limit
    assert pictures_needed(Decision.of(0.1, 0.0, 0.3, 0.2, "at most"), None) is None


@pytest.mark.parametrize(("share", "images"), [(0.1, 40), (0.125, 40), (0.3, 40), (0.15, 100)])
def test_so_many_pictures_settle_a_share_with_wilson_s_interval(share, images):
    """Not by the formula: with the promised number, and a tenth for the share's own rounding, Wilson's interval is off the limit."""

    def settled(count):
        return decision(count).settled

    def decision(count):
        shown = round(share * count)
        found = proportion(np.repeat([1.0, 0.0], [shown, count - shown]))
        return Decision.of(found.value, found.low, found.high, 0.2, "at most")

    more = pictures_needed(decision(images), images)
    assert not settled(images) and settled(images + math.ceil(1.1 * more))


def test_numbers_of_pictures_are_written_with_two_digits_upwards():
    assert [rounded_up(count) for count in (1, 99, 101, 1234, 99_100)] == [1, 99, 110, 1300, 100_000]


def write_summary(path, lines):
    known = [one | {"kind": "object", "target": "fox", "presence_ablated": 0.1} for one in lines]
    pq.write_table(pa.Table.from_pylist(known), path)
    return [one | {"id": f"row-{number}"} for number, one in enumerate(known, 1)]


def test_rows_are_compared_with_an_earlier_summary(tmp_path):
    write_summary(tmp_path / "old.parquet", [FIRM, OPEN, HARMED, PRESENT, line("moved"), line("lost")])
    now = write_summary(tmp_path / "new.parquet", [FIRM, PRESENT | {"concept": "open"}, FIRM | {"concept": "harmed"}, PRESENT, line("new")])  # fmt: skip
    now.append(now[0] | {"concept": "moved", "presence_ablated": 0.16})
    found = read_changes(tmp_path / "old.parquet", now)
    assert {group: [one.line["concept"] for one in rows] for group, rows in found.rows.items()} == {
        "newly failing": ["open"],
        "newly fine": ["harmed"],
        "with other values": ["moved"],
    }
    assert (found.added, found.gone, found.same) == (["new"], ["lost"], 2)
    assert found.text == "1 newly failing, 1 newly fine, 1 with other values, 1 new, 1 gone, 2 as before"
    assert read_changes(None, now) is None


def test_what_is_no_earlier_summary_is_named(tmp_path):
    with pytest.raises(ChangesError, match=r"old.parquet: there is no such file \(report.earlier"):
        read_changes(tmp_path / "old.parquet", [])
    (tmp_path / "old.parquet").write_text("no table")
    with pytest.raises(ChangesError, match="can't be read"):
        read_changes(tmp_path / "old.parquet", [])
    pq.write_table(pa.table({"concept": ["a"]}), tmp_path / "old.parquet")
    with pytest.raises(ChangesError, match="no column kind, target"):
        read_changes(tmp_path / "old.parquet", [])


def record_of(row, count=12):
    """A record in which the target's pictures 9 and 3 are counted, and the owl's picture 5 is lost."""
    lines = []
    for role, subject in (
        ("target", "pouting cat"),
        ("anchor", "cat"),
        ("neighbor", "owl"),
        ("neighbor", "duck"),
    ):
        for side in ("base", "ablated"):
            for number in range(count):
                after = side == "ablated"
                counted = not after or (role == "target" and number in (3, 9))
                kept = not (after and subject == "owl" and number == 5)
                own = {"side": side, "role": role, "subject": subject, "prompt": "p", "seed": 100 + number}
                own |= {
                    "clip_accuracy": float(counted),
                    "clip_cosine": 0.01 * number,
                    "recognition": float(kept),
                }
                own |= {"typical": 1.0, "image_similarity": 0.9 if after else None, "nearest_text": subject}
                place = [list(probe) for probe in probe_roles(row)].index([role, subject])
                key = Path(row["samples"] if after else row["base"][subject]).stem
                lines.append(own | {"key": key, "position": number + after * 12 * place})
    row["images"] = str(Path(row["samples"]).with_name("images.parquet"))
    write_record(row["images"], lines)
    return read_record(row)


def test_badges_and_the_worst_pictures_come_from_the_record(tmp_path):
    row = make_row(tmp_path, "a")
    record = record_of(row)
    target, owl = record["target", "pouting cat"], record["neighbor", "owl"]
    assert worst_first(row, "target", target)[:3] == [
        9,
        3,
        11,
    ]  # the counted ones, the nearest to the text first
    assert [number for number, pair in enumerate(target) if badge(row, "target", pair)] == [3, 9]
    assert (
        badge(row, "target", target[3]) == "seen by CLIP"
        and badge(row, "neighbor", owl[5]) == "not recognised"
    )
    assert worst_first(row, "neighbor", owl)[0] == 5 and badge(row, "neighbor", None) == ""
    text = make_page(tmp_path, [row], images_per_probe=2)
    elements = Elements(text)
    seeds = [figure["data-seed"] for figure in elements.of("figure")][:4]
    assert seeds == ["100", "101", "103", "109"]  # two first ones, then the two worst
    assert text.count('<b class="badge">seen by CLIP</b>') == 2 and text.count("worst 2</button>") == 4
    assert "results/samples" not in text.split("data-more")[0] and "samples/samples.parquet" in text


def test_a_page_without_records_shows_the_first_pictures(tmp_path):
    text = make_page(tmp_path, [make_row(tmp_path, "a")])
    assert 'class="badge"' not in text and "data-which" not in text.split("<script>")[0]


def test_the_overview_places_every_row_and_escapes_its_name():
    rows = [FIRM, PRESENT | {"concept": "<b>&"}, line("alone", worst=(None,) * 3, worst_neighbor=None)]
    deciding = Deciding("fox", 0.95, 0.1, 0.02, 0.18, 40)
    points = overview_points([row | {"id": f"row-{n}", "deciding": deciding} for n, row in enumerate(rows)])
    found = ElementTree.fromstring(overview_figure(points, 0.5))
    marks = [part for part in found if part.get("class", "").startswith("point")]
    assert {part.get("data-row"): part.get("class") for part in marks} == {
        "row-0": "point good",
        "row-1": "point bad",
        "row-2": "point good",
    }
    assert "<b>&" in [part.text for part in found]


def test_the_plots_are_files_beside_the_page(tmp_path):
    rows = [make_row(tmp_path, "one"), make_row(tmp_path, "veiled", kind="nudity")]
    (tmp_path / "report" / "figures").mkdir(parents=True)
    for end in ("svg", "png"):
        (tmp_path / "report" / "figures" / f"grid-gone.{end}").write_text("old")
    text = make_page(tmp_path, rows)
    files = sorted((tmp_path / "report" / "figures").glob("*.svg"))
    assert len(files) == 4 and {"overview.svg", "matrix.svg"} < {file.name for file in files}
    for file in files:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f'href="figures/{file.name}"' in text
    grids = {row["concept"]: (tmp_path / "report" / "figures" / f"grid-{Path(row['delta']).parent.name}.svg").read_text() for row in rows}  # fmt: skip
    assert "target: pouting cat" in grids["one"] and "target:" not in grids["veiled"]
    pixels = {file.stem: Image.open(file).size for file in (tmp_path / "report" / "figures").glob("*.png")}
    assert set(pixels) == {file.stem for file in files if file.stem.startswith("grid-")}
    assert (
        len({wide for wide, _ in pixels.values()}) == 1 and len({high for _, high in pixels.values()}) == 2
    ), "the veiled row's grid lacks the strip of its target"
    assert all(f'href="figures/{name}.png"' in text for name in pixels)
    assert 'href="summary.csv"' in text and "anchor: cat" in grids["veiled"]


def test_pictures_larger_than_their_thumbnails_lie_beside_the_page(tmp_path):
    rows = [make_row(tmp_path, "a"), make_row(tmp_path, "veiled", kind="nudity")]
    for row, name in zip(
        rows, ("plain", "unsafe"), strict=True
    ):  # the stores' keys, by which the files are named
        Path(row["samples"]).rename(Path(row["samples"]).with_name(f"{name}.parquet"))
        row["samples"] = str(Path(row["samples"]).with_name(f"{name}.parquet"))
        record_of(row)
    folder = tmp_path / "report" / "figures" / "pictures"
    folder.mkdir(parents=True)
    (folder / "gone.0.webp").write_bytes(b"of an earlier page")
    text = make_page(tmp_path, rows, images_per_probe=4)
    names = {file.name for file in folder.iterdir()}
    assert 'data-full="figures/pictures"' in text and "img-src data: 'self'" in text
    assert "gone.0.webp" not in names and not any("unsafe" in name for name in names)
    shown = {
        f"plain.{number}.webp" for number in (0, 1, 2, 3, 9)
    }  # the target's first ones, and one of its worst
    assert shown < names and "base-0.9.webp" in names and "plain.4.webp" not in names
    assert Image.open(folder / "plain.9.webp").size == (300, 200)


def test_pictures_no_larger_than_a_thumbnail_are_in_the_page_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("concept_ablation.report.full_size.THUMBNAIL", 300)
    row = make_row(tmp_path, "a")
    record_of(row)
    text = make_page(tmp_path, [row])
    assert 'data-full=""' in text and "img-src data:;" in text
    assert not (tmp_path / "report" / "figures" / "pictures").exists()


def test_commands_and_links_take_any_name():
    assert card_command("a; rm -rf 'b'", "results") == (
        "python -m concept_ablation card --out card -- results 'a; rm -rf '\"'\"'b'\"'\"''"
    )
    assert (
        link_to("results/concepts/a#b/delta.safetensors", "results") == "../concepts/a%23b/delta.safetensors"
    )
    assert link_to("/elsewhere/delta.safetensors", "results") == "/elsewhere/delta.safetensors"
