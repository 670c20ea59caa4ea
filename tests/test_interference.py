"""Who harms whom: which subjects are measured under which row's model, what the test says of them, and what the report makes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import binomtest, false_discovery_control

from concept_ablation.evaluation.interference import compare_victim
from concept_ablation.evaluation.statistics import Bootstrap, paired_loss
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.specs import build_plan
from concept_ablation.prompts.encodings import Alphabet, Encodings, choose_nearest, encode_words
from concept_ablation.report.interference import adjust, aggregate_interference
from concept_ablation.report.matrix import cluster_order, make_matrix
from concept_ablation.report.tables import TableError
from concept_ablation.report.victims import interference_text, read_interference
from tests.shipped import report_spec
from tests.test_report import HOSTILE, Elements, make_page, make_row, write_interference

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# Statistics


def test_the_chance_of_a_loss_is_the_exact_sign_test_of_pairs_that_differ(rng):
    for _ in range(50):
        before, after = rng.integers(0, 2, size=(2, rng.integers(2, 40))).astype(float)
        lost, gained = int(np.sum(before > after)), int(np.sum(before < after))
        expected = binomtest(lost, lost + gained, 0.5, "greater").pvalue if lost + gained else 1.0
        assert paired_loss(after, before) == pytest.approx(expected)
    assert paired_loss(np.zeros(16), np.ones(16)) == 2**-16
    assert paired_loss(np.array([0.5, 1, 0]), np.array([1, 1, 0.0])) == 0.5, "half an image lost is a loss"


def test_p_values_are_adjusted_as_by_benjamini_and_hochberg(rng):
    for size in (1, 2, 7, 60):
        values = np.round(rng.random(size) ** 3, 2) + 1e-6
        assert adjust(list(values)) == pytest.approx(false_discovery_control(values, method="bh"))
    assert adjust([]) == [] and adjust([0.03, 0.001, 0.9]) == pytest.approx([0.045, 0.003, 0.9])


def test_alike_rows_stand_together_as_in_a_tree_of_average_linkage(rng):
    vectors = rng.normal(size=(3, 5))[rng.integers(3, size=14)] * 3 + rng.normal(size=(14, 5))
    order = cluster_order(vectors)
    assert sorted(order) == list(range(14))
    tree = linkage(vectors, "average")
    for count in range(1, 15):  # every cluster of the tree is one run of the order
        labels = fcluster(tree, count, "maxclust")[order]
        assert np.count_nonzero(np.diff(labels)) == len(set(labels)) - 1
    assert cluster_order(np.zeros((0, 3))) == [] and cluster_order(np.zeros((1, 3))) == [0]


def test_a_victim_is_lost_when_its_pictures_become_another_subjects(rng):
    subjects = {name: unit(rng.normal(size=32)) for name in ("owl", "fox", "pizza")}

    def pictures(name):
        return unit(3 * subjects[name] + rng.normal(size=(16, 32)) / 4)

    base, bootstrap = pictures("owl"), Bootstrap(0.95, 200, 0)
    same = compare_victim("owl", base, base, subjects, bootstrap)
    assert (same["recognition_change"], same["typical_change"], same["p"], same["n"]) == (0, 0, 1, 16)
    lost = compare_victim("owl", base, pictures("fox"), subjects, bootstrap)
    assert lost["recognition_change"] == -1 and lost["recognition_p"] == 2**-16
    assert lost["p"] == 2 * 2**-16, "the smaller p of two tests, twice"
    assert lost["recognition_low"] == -1 and lost["recognition_high"] < -0.5
    assert (
        lost["typical_ablated"] == 0 and lost["typical_low"] < lost["typical_change"] < lost["typical_high"]
    )


# The plan


def concept(target, anchor, *neighbors, kind="object", **more):
    return Concept(f"{kind}-{target}", kind, (target,), anchor, neighbors, **more)


FOX = concept("fox", "animal", "dog", "lion")
WOLF = concept("wolf", "animal", "dog", "panda")
OWL = concept("owl", "bird", "penguin", "dog")
ROCKET = concept("rocket", "vehicle", "bus", "car")
INK = concept("ink", "picture", "neon", "pixel", kind="style")
NEON = concept("neon", "picture", "ink", "fox", kind="style")  # a style called fox
TABLE = [FOX, WOLF, OWL, ROCKET, INK, NEON]


@pytest.fixture
def config(monkeypatch):
    """The shipped config, in the checkout."""
    monkeypatch.chdir(ROOT)
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())


def victims(plan):
    return {
        row.concept.name: {one.subject for one in row.interference.victims} if row.interference else None
        for row in plan.rows
    }


def test_all_asks_for_all_subjects_of_other_rows_once(config):
    config["evaluation"]["interference"] = "all"
    plan = build_plan(TABLE, config)
    found = victims(plan)
    assert found["object-fox"] == {"wolf", "dog", "panda", "owl", "penguin", "rocket", "bus", "car"} | {
        "ink",
        "neon",
        "pixel",
        "fox",  # the style of that name
    }
    assert found["style-ink"] >= {"neon", "fox"} and "pixel" not in found["style-ink"], (
        "its own neighbor alone"
    )
    (fox,) = (row for row in plan.rows if row.concept.name == "object-fox")
    by_name = {one.subject: one for one in fox.interference.victims}
    assert (by_name["dog"].role, by_name["dog"].row, by_name["dog"].rows) == ("neighbor", "object-owl", 2)
    assert (by_name["neon"].role, by_name["neon"].row, by_name["neon"].rows) == ("target", "style-neon", 2)
    assert by_name["dog"].probed == ("neighbor", "dog") and by_name["dog"].base == fox.base["dog"]
    assert by_name["wolf"].probed is None
    (wolf,) = (row for row in plan.rows if row.concept.name == "object-wolf")
    assert by_name["wolf"].base == wolf.base["wolf"], "what the base model has drawn for its own row"


def test_a_victim_is_judged_among_its_own_rows_subjects_on_few_pictures(config):
    plan = build_plan(TABLE, config)
    (row,) = (row for row in plan.rows if row.concept.name == "object-fox")
    spec = plan.specs["measure_interference"][row.interference.key]
    work = {one["subject"]: one for one in spec["victims"]}
    assert set(work["wolf"]["texts"]) == {"wolf", "dog", "panda"} and work["wolf"]["images"] == 16
    assert spec["samples"] == row.samples and spec["delta"] == row.ablation
    assert spec["base"] == [one.base for one in row.interference.victims]


def test_near_takes_subjects_of_the_same_anchor_and_as_many_of_all_others(config):
    config["evaluation"]["interference_nearest"] = 1
    plan = build_plan(TABLE, config)
    for row in plan.rows:
        drawn = [one.subject for one in row.interference.victims if not one.probed]
        assert len(drawn) == (1 if row.concept.anchor in ("bird", "vehicle") else 2)
    assert victims(plan)["object-fox"] & {"wolf", "panda"}
    assert victims(plan)["style-neon"] >= {"ink"}, "it draws this one anyway"


def test_nothing_is_measured_where_it_is_switched_off_or_there_is_no_other_row(config):
    config["evaluation"]["interference"] = "none"
    plan = build_plan(TABLE, config)
    assert set(victims(plan).values()) == {None} and not plan.measures_interference
    assert "interference" not in plan.report_spec()
    config["evaluation"]["interference"] = "near"
    assert victims(build_plan([FOX], config)) == {"object-fox": None}
    one = replace(FOX, overrides={"evaluation.interference": "none"})
    found = victims(build_plan([one, OWL], config))
    assert found["object-fox"] is None and found["object-owl"]
    off = victims(build_plan([FOX, OWL, replace(ROCKET, enabled=False)], config))
    assert off["object-rocket"] and not (off["object-fox"] | off["object-owl"]) & {"rocket", "bus", "car"}


def test_a_new_row_leaves_all_other_work_as_it_is(config):
    before, after = build_plan(TABLE[:-1], config), build_plan([NEON, *reversed(TABLE[:-1])], config)
    for stage, specs in before.specs.items():
        if stage != "measure_interference":
            # A longer store may stand for one that isn't there yet (tests/test_stores.py).
            assert specs.keys() <= after.specs[stage].keys() | after.longer.keys()
    again = build_plan(list(reversed(TABLE)), config)
    assert again.specs == after.specs, "the table's order decides nothing"
    plain = build_plan(TABLE, config | {"evaluation": config["evaluation"] | {"interference": "none"}})
    for row, other in zip(after.rows, plain.rows, strict=True):
        assert replace(row, interference=None) == other


def test_a_matrix_of_all_is_refused_where_it_would_be_huge(config):
    config["evaluation"]["interference"] = "all"
    rows = [concept(f"thing {number}", "animal") for number in range(400)]
    with pytest.raises(PlanError, match=r"would measure 160,000 pairs .* set near"):
        build_plan(rows, config)


def test_the_report_waits_for_what_is_measured(config, tmp_path):
    config["results"] = str(tmp_path)
    plan = build_plan([FOX, OWL], config)
    row = plan.rows[0]
    files = plan.interference_files(row)
    assert set(files.values()) <= set(plan.files(row)) and files["scores"] in plan.goals()
    assert files["scores"] in plan.small_files() and files["images"] not in plan.small_files()
    assert {row.interference.key, row.scores} <= plan.needed(row).keys()
    for file in plan.files(row):
        if file not in files.values():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("made up")
    assert row in plan.unfinished() and row.concept.name not in {
        one.concept.name for one in plan.unfinished(judged=True)
    }


# What is near


def test_the_text_encoder_finds_near_words_without_torch():
    near = encode_words(
        ROOT / "embedded/emoji-diffusion", ["penguin", "rocket", "owl", "pencil", "weary cat"]
    )
    ((values),) = near.compare([[2]])
    assert values.argmax() == 2 and np.argsort(-values)[1] == 0, "an owl is nearer to a penguin"
    assert np.all(near.rows == np.rint(near.rows)) and np.linalg.norm(near.rows, axis=1) == pytest.approx(
        4000, 1e-3
    )


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_encodings_are_means_of_token_embeddings_of_any_precision(tmp_path, kind):
    import torch
    from safetensors.torch import save_file

    from tests.tiny import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    table = torch.randn(len(tokenizer), 24, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, kind)
    )
    names = {"other.weight": torch.zeros(3), "text_model.embeddings.token_embedding.weight": table}
    save_file(names, tmp_path / "text_encoder" / "model.safetensors")
    words = ["owl", "a fox", "neon"]
    near = encode_words(tmp_path, words)
    means = [
        table[tokenizer(word, add_special_tokens=False)["input_ids"]].double().mean(0).numpy()
        for word in words
    ]
    expected = unit(np.stack(means)) @ unit(np.stack(means)).T
    found = np.stack(list(near.compare([[0], [1], [2]])))
    np.testing.assert_allclose(found / 4000**2, expected, atol=2e-3)


def test_without_a_text_encoder_the_next_words_of_the_alphabet_are_near(tmp_path):
    assert encode_words(tmp_path, ["owl"]) is None
    chosen = choose_nearest(Alphabet(5), [[1], [4]], [[0, 1, 2], []], [[1], [4, 0]], [1, 2])
    assert chosen == [[2, 3], [1, 2]]


def test_of_equally_near_words_the_first_are_taken():
    near = Encodings(np.array([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32))
    assert choose_nearest(near, [[0]], [[]], [[0]], [2]) == [[1, 3]]
    assert choose_nearest(near, [[2, 4]], [[1, 3]], [[2]], [1]) == [[1, 0]]
    assert choose_nearest(near, [[0]], [[1, 2]], [[0]], [9]) == [[1, 2, 3, 4]]
    assert choose_nearest(near, [[0]], [[1, 2]], [[0]], [0]) == [[]]


def test_the_nearest_of_many_words_are_those_that_sorting_all_of_them_gives(rng):
    near = Encodings(rng.integers(-9, 10, size=(300, 4)).astype(np.float32))  # many ties
    for count in (1, 3, 8):
        target, peers = [int(rng.integers(300))], sorted(rng.choice(300, 20, replace=False).tolist())
        taken = [*target, *rng.choice(300, 5, replace=False).tolist()]
        values = near.rows @ near.rows[target[0]]
        order = [int(word) for word in np.argsort(-values, kind="stable") if word not in taken]
        first = [word for word in order if word in peers][:count]
        expected = first + [word for word in order if word not in first][:count]
        assert choose_nearest(near, [target], [peers], [taken], [count]) == [expected]


# The report


def made_up(folder, **losses):
    rows = [{"concept": name, "targets": [name], "samples": "none"} for name in losses]
    for row in rows:
        write_interference(folder / row["concept"], row, losses[row["concept"]])
    return report_spec(rows)


def test_the_table_adjusts_for_all_pairs_and_names_victims_worst_first(tmp_path):
    spec = made_up(tmp_path, fox={"owl": -0.75, "pizza": 0.0, "bus": -1.0}, neon={"owl": -0.25})
    path = tmp_path / "report" / "interference.parquet"
    aggregate_interference(spec, path)
    lines = pq.read_table(path).to_pylist()
    assert [line["p_adjusted"] for line in lines] == pytest.approx(
        false_discovery_control([line["p"] for line in lines])
    )
    found = read_interference(path)
    assert [line["harmed"] for line in found["fox"]] == [True, False, True]
    assert found["neon"][0]["p"] == pytest.approx(0.125) and not found["neon"][0]["harmed"]
    assert interference_text(found) == "2 of 4 measured pairs harmed: fox harms bus (-100), owl (-75)"
    assert interference_text({"neon": found["neon"]}) == "None of 1 measured pairs harmed"
    assert (
        path.with_suffix(".csv")
        .read_text()
        .startswith('"concept","victim","victim_kind","role","row","rows"')
    )


def test_a_damaged_table_is_named(tmp_path):
    spec = made_up(tmp_path, fox={"owl": 0.0})
    Path(spec["rows"][0]["interference"]["scores"]).write_text("no table")
    with pytest.raises(TableError, match=r"victims.parquet.*run again"):
        aggregate_interference(spec, tmp_path / "out.parquet")


def test_the_map_shows_the_largest_losses_and_says_how_much_it_leaves_out(tmp_path):
    losses = {f"row{number}": {f"s{number}": -number / 10, f"s{number + 1}": 0.0} for number in range(6)}
    path = tmp_path / "interference.parquet"
    aggregate_interference(made_up(tmp_path, **losses), path)
    matrix = make_matrix(read_interference(path), 3, 2)
    assert sorted(matrix.rows) == ["row3", "row4", "row5"] and matrix.hidden == (3, 5)
    assert {column["victim"] for column in matrix.columns} == {"s4", "s5"}
    cells = {
        (row, column["victim"]): cell and cell["change"]
        for row, own in zip(matrix.rows, matrix.cells, strict=True)
        for column, cell in zip(matrix.columns, own, strict=True)
    }
    assert cells["row4", "s4"] == -0.4 and cells["row4", "s5"] == 0 and cells["row3", "s5"] is None
    assert make_matrix({"row1": []}) is None


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two rows of which one harms a concept of the other, and one that measures nothing."""
    folder = tmp_path_factory.mktemp("harm")
    rows = [make_row(folder, name) for name in ("fox", "neon", "alone")]
    write_interference(folder / "fox", rows[0], {"pencil": -1.0, "owl": -0.1, "weak": 0.0}, probed={"owl"})
    write_interference(folder / "neon", rows[1], {"fox": 0.0, "pencil": -0.2})
    return make_page(folder, rows)


def test_the_page_says_who_harms_whom_and_each_cell_leads_to_its_pictures(page):
    elements = Elements(page)
    assert "1 of 5 measured pairs harmed: fox harms pencil (−100)." in page
    places = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    cells = [one for one in elements.of("a") if "aria-label" in one]
    assert {one["aria-label"] for one in cells} == {
        "fox on pencil: −100.0 points, harmed",
        "fox on owl: −10.0 points",
        "fox on weak: 0.0 points",
        "neon on fox: 0.0 points",
        "neon on pencil: −20.0 points",
    }
    assert {one["href"].removeprefix("#") for one in cells} <= places
    shown = {
        "fox on owl": "row-2-probe-3",  # rows stand by name: alone, fox, neon
        "fox on pencil": "row-2-victim-1",
    }
    for label, place in shown.items():
        assert next(one["href"] for one in cells if one["aria-label"].startswith(label)) == f"#{place}"


def test_a_row_names_its_victims_and_shows_more_of_what_it_harms(page):
    section = page[page.index('id="row-2"') : page.index('id="row-3"')]
    assert "1 of 3 harmed" in section and ">pencil</a> −100.0 points" in section
    harmed, weak = section.index('id="row-2-victim-1"'), section.index('id="row-2-victim-3"')
    assert section[harmed:weak].count("<figure data-seed") == 8 and "first 4 of 16 seeds" in section[weak:]
    alone = page[page.index('id="row-1"') : page.index('id="row-2"')]
    assert "harmed" not in alone.replace("target_harmed", "")


def test_the_summary_has_every_rows_victims(tmp_path):
    rows = [make_row(tmp_path, name) for name in ("fox", "neon", "alone")]
    write_interference(tmp_path / "fox", rows[0], {"pencil": -0.8, "owl": -1.0, "weak": 0.0})
    write_interference(tmp_path / "neon", rows[1], {"fox": 0.0})
    make_page(tmp_path, rows)
    lines = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    found = {line["concept"]: (line["victims"], line["victims_measured"]) for line in lines}
    assert found == {"fox": (["owl", "pencil"], 3), "neon": ([], 1), "alone": (None, None)}


def test_one_row_has_no_matrix(tmp_path):
    row = make_row(tmp_path, "fox")
    write_interference(tmp_path / "fox", row, {"pencil": -1.0})
    text = make_page(tmp_path, [row])
    assert 'class="matrix"' not in text and "of 1 harmed" in text


def test_pictures_of_victims_that_are_to_be_hidden_are_veiled_and_hostile_names_stay_text(tmp_path):
    rows = [make_row(tmp_path, name) for name in ("fox", "neon")]
    write_interference(tmp_path / "fox", rows[0], {"bad": -1.0}, kind="nudity")
    write_interference(tmp_path / "neon", rows[1], {HOSTILE: -1.0}, row=HOSTILE)
    text = make_page(tmp_path, rows)
    elements = Elements(text)
    assert len(elements.of("script")) == 1
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)
    place = text.index('id="row-1-victim-1"')
    assert 'class="strip veiled"' in text[place : text.index('id="row-2"')]
    assert text.count('class="strip veiled"') == 1


def test_over_the_budget_only_what_is_harmed_shows_a_pair(tmp_path):
    rows = [make_row(tmp_path, f"row {number}", neighbors=()) for number in range(3)]
    for row in rows:
        write_interference(tmp_path / row["concept"], row, {"pencil": -1.0, "owl": 0.0})
    text = make_page(tmp_path, rows, image_budget=12)
    assert text.count('aria-label="pencil: images') == 3 and 'aria-label="owl: images' not in text
    assert text.count("16 seeds, not shown") == 3
