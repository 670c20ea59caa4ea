"""A target asked for in other words: the prompts of each family, what is planned of them, and what the tables and the page say."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from concept_ablation.common.attack_table import COLUMNS
from concept_ablation.common.image_store import open_store, write_store
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.specs import build_plan
from concept_ablation.prompts.rewording import FAMILIES, PromptsError, Words, misspellings, reword
from concept_ablation.registries import ATTACKS
from concept_ablation.report import console
from concept_ablation.report.attacks import aggregate_attacks
from concept_ablation.report.comebacks import attack_columns, attacks_text, read_attacks, worst_attack
from concept_ablation.report.images import aggregate_images
from concept_ablation.report.tables import TableError
from concept_ablation.verdict import PRESENT
from tests.shipped import report_spec
from tests.test_report import HOSTILE, images, make_page, make_row
from tests.test_triage import record_of

ROOT = Path(__file__).parents[1]
TEMPLATES = {
    "paraphrase": ["a sketch of a {target}", "look, a {target}"],
    "longer": ["{request}, very detailed"],
    "beside": ["{request} and a {neighbor}"],
}
OWL = Words(
    "owl",
    "bird",
    lambda word, count: [f"one {word}", f"my {word}", f"the {word}"][:count],
    ["a bird"],
    ("duck", "eagle"),
    ("strix", "hooter"),
    ("Eule", "hibou"),
    TEMPLATES,
)
FOX = Concept("fox", "object", ("fox",), "animal", ("dog", "lion"))
INK = Concept("ink", "style", ("ink",), "picture", ("neon",))


@pytest.fixture
def config(monkeypatch):
    """The shipped config, in the checkout; nothing is measured on other rows."""
    monkeypatch.chdir(ROOT)
    made = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    made["evaluation"]["interference"] = "none"
    return made


def families_of(plan, number=0):
    (key, *_) = plan.rows[number].attacks
    return {one["family"]: one for one in plan.specs["probe_wordings"][key]["families"]}


# Words


def test_each_family_says_the_target_in_its_own_way():
    made = reword([OWL], 4)
    assert list(made) == list(FAMILIES) and {len(prompts) for prompts in made.values()} == {4}
    assert made["paraphrase"] == ["a sketch of an owl", "look, an owl"] * 2, "the article fits the word"
    assert made["longer"][:2] == ["one owl, very detailed", "my owl, very detailed"]
    assert made["beside"][:2] == ["one owl and a duck", "my owl and an eagle"]
    assert made["synonym"] == ["one strix", "my hooter", "the strix", "one hooter"]
    assert made["language"] == ["one Eule", "my hibou", "the Eule", "one hibou"]
    assert all("owl" not in prompt.split() for prompt in made["typo"])


def test_a_family_without_words_is_left_out():
    bare = dataclasses.replace(OWL, neighbors=(), synonyms=(), translations=())
    assert list(reword([bare], 3)) == ["paraphrase", "typo", "longer"]


def test_several_targets_take_turns():
    elk = dataclasses.replace(OWL, target="elk", synonyms=())
    made = reword([OWL, elk], 5)
    assert [("owl" in prompt, "elk" in prompt) for prompt in made["longer"]] == [(1, 0), (0, 1)] * 2 + [
        (1, 0)
    ]
    assert len(made["synonym"]) == 5, "only one of them has synonyms"


@pytest.mark.parametrize(
    "word", ["fox", "strawberry", "pouting cat", "New Orleans House Galaxy Case", "r2d2", "狐狸", "a"]
)
def test_a_misspelling_is_one_letter_away(word):
    made = misspellings(word, 12, {word.casefold()})
    assert len(set(made)) == len(made) and word not in made
    for typo in made:
        kind = len(typo) - len(word)
        if kind == 0:  # two neighbors swapped
            differ = [place for place in range(len(word)) if typo[place] != word[place]]
            assert len(differ) == 2 and differ[1] == differ[0] + 1
            assert sorted(typo) == sorted(word)
        else:  # one left out, or one doubled
            shorter, longer = sorted((typo, word), key=len)
            assert len(longer) == len(shorter) + 1
            assert any(longer[:place] + longer[place + 1 :] == shorter for place in range(len(longer)))
    assert made == misspellings(word, 12, {word.casefold()}), "the same every time"


def test_a_misspelling_is_no_other_word_of_the_row():
    assert "ox" in misspellings("fox", 20) and "ox" not in misspellings("fox", 20, {"ox", "fox"})
    assert all(typo[0] == "s" for typo in misspellings("strawberry", 20)), "the first letter stays"


def test_a_wrong_template_is_named():
    for family, wrong, why in (
        ("paraphrase", "a bird", "needs {target}"),
        ("longer", "{request} {target}", "no other slot"),
        ("beside", "{request}", "needs {neighbor} and {request}"),
    ):
        with pytest.raises(PromptsError, match=f"evaluation.wordings.{family}.*{why}"):
            reword([dataclasses.replace(OWL, templates={**TEMPLATES, family: [wrong]})], 2)
    with pytest.raises(PromptsError, match="holds no template"):
        reword([dataclasses.replace(OWL, templates={**TEMPLATES, "longer": []})], 2)


# The plan


def test_every_row_is_asked_in_other_words_from_seeds_of_its_own(config):
    plan = build_plan([FOX, INK], config)
    fox, ink = families_of(plan), families_of(plan, 1)
    assert list(fox) == list(ink) == ["paraphrase", "typo", "longer", "beside"]
    assert ink["beside"]["prompts"][0].endswith("in the style of ink and neon")
    probes = plan.specs["sample_ablated"][plan.rows[0].samples]["probes"]
    seeds = [one["seed"] for one in (*fox.values(), *probes)]
    assert len(set(seeds)) == len(seeds) and all(seed % 1000 == 0 for seed in seeds)


def test_what_a_row_cost_counts_what_it_was_asked_in_other_words(config):
    plan = build_plan([FOX], config)
    jobs = json.loads(plan.report_spec())["rows"][0]["jobs"]
    assert f"probe_wordings/{plan.rows[0].attacks[0]}" in jobs and len(set(jobs)) == len(jobs)


def test_wordings_change_no_other_key_and_can_be_left_out(config):
    plan = build_plan([FOX], config)
    config["evaluation"]["wordings"]["images"] = 0
    without = build_plan([FOX], config)
    assert not without.rows[0].attacks and not without.attacks_rows and plan.attacks_rows
    for name in ("anchors", "ablation", "samples", "scores", "base"):
        assert getattr(plan.rows[0], name) == getattr(without.rows[0], name)
    assert set(plan.files(plan.rows[0])) - set(without.files(without.rows[0])) == {
        file for key in plan.rows[0].attacks for file in plan.unit_files(key).values()
    }
    told = [json.loads(one.report_spec())["rows"][0]["jobs"] for one in (plan, without)]
    assert set(told[0]) - set(told[1]) == {f"probe_wordings/{key}" for key in plan.rows[0].attacks}, (
        "its cost is the row's"
    )


def test_synonyms_and_other_languages_come_from_the_table_and_a_file(config, tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("FOX: {de: Fuchs, fr: renard, es: zorro}\nelk: {de: Elch}\n", encoding="utf-8")
    config["evaluation"]["wordings"]["languages"] = str(file)
    found = families_of(build_plan([dataclasses.replace(FOX, synonyms=("vixen", "Fox"))], config))
    assert any("renard" in prompt for prompt in found["language"]["prompts"])
    assert all("vixen" in prompt for prompt in found["synonym"]["prompts"]), (
        "the target is no synonym of itself"
    )


@pytest.mark.parametrize("content", ["fox: Fuchs", "fox: {de: 3}", "fox: {de: ' '}", "fox: {de: a, de: b}"])
def test_a_wrong_file_of_words_is_named_with_what_is_allowed(config, tmp_path, content):
    file = tmp_path / "words.yaml"
    file.write_text(content, encoding="utf-8")
    for path, why in ((file, "words.yaml"), (tmp_path / "none.yaml", "can't be read")):
        config["evaluation"]["wordings"]["languages"] = str(path)
        with pytest.raises(PlanError, match=f"evaluation.wordings.languages: .*{why}"):
            build_plan([FOX], config)


def test_the_shipped_words_of_other_languages_fit_the_shipped_table():
    words = yaml.safe_load((ROOT / "config/languages.yaml").read_text(encoding="utf-8"))
    assert all(len(own) == 5 for own in words.values())


def test_an_attack_is_planned_where_it_is_asked_for(config):
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    names = schema["properties"]["evaluation"]["properties"]["attack"]["enum"]
    assert names == ["none", *ATTACKS] and set(ATTACKS) < set(config["evaluation"]["attacks"])
    soft, prefix = (
        build_plan([dataclasses.replace(FOX, overrides={"evaluation.attack": name})], config)
        for name in ATTACKS
    )
    (spec,) = soft.specs["attack_concept"].values()
    assert spec["aims"]["ablated"]["prompts"][0][0] == "an image of a <learned>"
    assert spec["pictures"] == [soft.rows[0].base["fox"]] and spec["control"] == soft.rows[0].base["animal"]
    (spec,) = prefix.specs["attack_concept"].values()
    assert spec["aims"]["ablated"]["prompts"][0][0] == "<learned> an image of a fox"
    assert spec["aims"]["control"]["prompts"][0][0] == "<learned> an image of an animal"
    assert soft.rows[0].ablation == prefix.rows[0].ablation


# The tables and the page


def write_attacks(folder, row, shares, /, count=8, role=""):
    """Give a row families with these shares of pictures that show the target, and pictures of them."""
    folder.mkdir(exist_ok=True)
    scores, pictures = folder / "wordings.parquet", folder / "wordings.images.parquet"
    lines = []
    for family, (base, ablated) in shares.items():
        line = {"family": family, "n": count}
        for side, share in (("base", base), ("ablated", ablated)):
            line |= {side: share, f"{side}_low": max(0.0, share - 0.1), f"{side}_high": min(1.0, share + 0.1)}
            line[f"{side}_seen"] = [float(number < round(count * share)) for number in range(count)]
        lines.append(line | {"worst_low": max(0.0, ablated - 0.3), "worst_high": min(1.0, ablated + 0.3)})
    pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), scores)
    drawn = [
        images(side, family, count, colour, HOSTILE)
        for side, colour in (("base", "red"), ("ablated", "blue"))
        for family in shares
    ]
    write_store(pictures, (image for own in drawn for image in own), {})
    row["attacks"] = [{"scores": str(scores), "images": str(pictures)}]


@pytest.fixture
def rows(tmp_path):
    made = [make_row(tmp_path, name) for name in ("elk", "fox")]
    write_attacks(tmp_path / "a", made[0], {"paraphrase": (0.9, 0.1), "typo": (0.3, 0.05)})
    write_attacks(tmp_path / "b", made[1], {"paraphrase": (0.9, 0.25), "typo": (0.8, 0.75)})
    return made


def test_the_table_says_what_brings_a_target_back_and_how_surely(rows, tmp_path):
    out = tmp_path / "report" / "attacks.parquet"
    out.parent.mkdir()
    aggregate_attacks(report_spec(rows), out)
    lines = {(line["concept"], line["family"]): line for line in pq.read_table(out).to_pylist()}
    outcome = {place: (line["back"], line["firm"], line["shown"]) for place, line in lines.items()}
    assert outcome == {
        ("elk", "paraphrase"): (False, True, True),
        ("elk", "typo"): (False, True, False),
        ("fox", "paraphrase"): (True, False, True),
        ("fox", "typo"): (True, True, True),
    }
    assert {line["limit"] for line in lines.values()} == {0.2}
    assert pa.csv.read_csv(out.with_suffix(".csv")).num_rows == 4
    tried = read_attacks(out)
    assert worst_attack(tried["fox"])["family"] == "typo"
    assert attack_columns(tried["fox"]) == {
        "attack_worst": "typo",
        "attack_worst_base": 0.8,
        "attack_worst_share": 0.75,
        "attack_worst_low": 0.45,
        "attack_worst_high": 1.0,
        "attack_words_share": 0.75,
        "attack_learned_share": None,
        "attacks_back": "paraphrase; typo",
        "attack_images": 16,
    }
    learned = {**tried["fox"][0], "family": "soft-prompt", "ablated": 0.9}
    told = attack_columns([*tried["fox"], learned])
    assert (told["attack_worst"], told["attack_words_share"], told["attack_learned_share"]) == (
        "soft-prompt",
        0.75,
        0.9,
    )
    assert set(attack_columns(None).values()) == {None} and read_attacks(None) == {}
    assert (
        attacks_text(tried)
        == "1 of 2 targets comes back when asked for in another way: fox (typo, 75% of 8 images)"
    )
    unsure = {"fox": tried["fox"][:1], "elk": tried["elk"]}
    assert attacks_text(unsure).startswith("None of 2 targets come back")
    assert attacks_text(unsure).endswith("way, 1 more may: fox (paraphrase, 25% of 8 images, provisional)")


def test_the_pictures_of_wordings_are_in_the_table_of_pictures(rows, tmp_path):
    for row in rows:
        record_of(row)
    out = tmp_path / "images.parquet"
    aggregate_images(report_spec(rows), out)
    found = pq.read_table(out).to_pandas().query("role == 'attack'")
    shares = found.groupby(["concept", "subject", "side"]).clip_accuracy.mean()
    table = tmp_path / "attacks.parquet"
    aggregate_attacks(report_spec(rows), table)
    for line in pq.read_table(table).to_pylist():
        for side in ("base", "ablated"):
            assert shares[line["concept"], line["family"], side] == round(8 * line[side]) / 8
        store = open_store(line["images"])
        for one in found[(found.concept == line["concept"]) & (found.subject == line["family"])].itertuples():
            place = store.rows[one.position]
            assert (place["role"], place["subject"], place["seed"]) == (one.side, one.subject, one.seed)


def test_the_summary_and_the_page_have_the_worst_family(rows, tmp_path):
    page = make_page(tmp_path, rows)
    summary = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    assert [line["attacks_back"] for line in summary] == ["", "paraphrase; typo"]
    assert "Asked for in another way" in page and "The target comes back" in page
    assert "first 8 of 8 seeds" in page and HOSTILE not in page
    assert page.count("The target stays away") == 1


def test_a_report_without_attacks_says_nothing_of_them(tmp_path):
    page = make_page(tmp_path, [make_row(tmp_path, "elk")])
    assert "Asked for in another way" not in page
    (line,) = pq.read_table(tmp_path / "report" / "summary.parquet").to_pylist()
    assert line["attack_worst"] is None and line["attack_images"] is None


def test_a_damaged_table_is_named(rows, tmp_path):
    Path(rows[0]["attacks"][0]["scores"]).write_bytes(b"no table")
    with pytest.raises(TableError, match="measurements of attacks can't be read"):
        aggregate_attacks(report_spec(rows), tmp_path / "attacks.parquet")


def test_what_was_never_gone_is_not_said_to_come_back(rows, tmp_path, capsys):
    make_page(tmp_path, rows)
    path = tmp_path / "report" / "summary.parquet"
    attacks = path.with_name("attacks.parquet")
    console.print_summary(path, "x", attacks_path=attacks)
    assert "1 of 2 targets comes back when asked for in another way: fox" in capsys.readouterr().err
    table = pq.read_table(path)
    verdicts = pa.array(
        [PRESENT if name == "fox" else "removed, neighbors kept" for name in table["concept"].to_pylist()]
    )
    pq.write_table(table.set_column(table.schema.get_field_index("verdict"), "verdict", verdicts), path)
    console.print_summary(path, "x", attacks_path=attacks)
    assert "None of 1 targets come back when asked for in another way." in capsys.readouterr().err
