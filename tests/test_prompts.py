"""Prompts: whole words, articles, plurals, golden prompts of every kind."""

import json

import pytest

from concept_ablation.prompts.stage import write_prompts
from concept_ablation.prompts.templates import PromptsError, expand, file_source, read_templates
from concept_ablation.prompts.wording import has_word, replace_word, with_article
from concept_ablation.registries import KINDS

STYLE = ["{prompt} in the style of {target}", "{prompt}, {target} style"]


@pytest.mark.parametrize(
    ("prompt", "word", "other", "wanted"),
    [
        ("a cat on a mat", "cat", "pouting cat", "a pouting cat on a mat"),
        ("A Cat, a CAT", "cat", "owl", "An Owl, an OWL"),
        ("a bird", "bird", "owl", "an owl"),
        ("an animal", "animal", "cat", "a cat"),
        ("two cats", "cat", "pouting cat", "two pouting cats"),
        ("two fruits", "fruit", "strawberry", "two strawberries"),
        ("a fisherman", "fish", "nemo", "a fisherman"),
        ("delicate cat", "cat", "grumpy cat", "delicate grumpy cat"),
        ("a cat-like cat's paw", "cat", "dog", "a cat-like dog's paw"),
        ("that robot", "robot", "r2d2", "that r2d2"),
        ("a c++ robot", "robot", r"\1", r"a c++ \1"),
        ("plain text", "cat", "dog", "plain text"),
    ],
)
def test_whole_words_are_replaced(prompt, word, other, wanted):
    assert replace_word(prompt, word, other) == wanted


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("owl", "an "), ("cat", "a "), ("unicorn", "a "), ("hourglass", "an "), ("r2d2", "an "), ("", "a ")],
)
def test_articles(word, wanted):
    assert with_article("a", word) == wanted


def test_slots_make_every_combination_once():
    templates = ["a {subject} on a {colour} {place}", "an {subject}", "a {subject}"]
    slots = {"colour": ["red", "orange"], "place": ["sofa", "bed"], "unused": ["x"]}
    assert expand(templates, "owl", slots) == [
        "an owl on a red sofa",
        "an owl on a red bed",
        "an owl on an orange sofa",
        "an owl on an orange bed",
        "an owl",
    ]


def test_an_unknown_slot_says_which_are_allowed():
    with pytest.raises(PromptsError, match=r"unknown slot \{color\} \(allowed: \{subject\}\)"):
        expand(["a {color} {subject}"], "cat", {"colour": ["red"]})


def test_prompts_without_the_anchor_are_left_out_with_a_count(caplog):
    assert KINDS["object"].anchor_prompts("cat", ["a cat", "a dog", "two cats"], {}) == ["a cat", "two cats"]
    assert "1 of 3 prompts don't contain 'cat'" in caplog.text


def test_no_prompt_with_the_anchor_is_an_error():
    with pytest.raises(PromptsError, match="none of 2 prompts contains the anchor 'cat'"):
        KINDS["object"].anchor_prompts("cat", ["a dog", "a catalogue"], {})


def test_a_count_is_spread_over_the_templates():
    templates = ["a {subject} {n}", "the {subject} {n}"]
    assert KINDS["object"].anchor_prompts("cat", templates, {"n": list("1234")}, 4) == [
        "a cat 1",
        "a cat 3",
        "the cat 1",
        "the cat 3",
    ]


def test_golden_target_prompts():
    assert KINDS["object"].target_prompts(["a cat", "two Cats"], ["weary cat"], "cat", []) == [
        ("a weary cat",),
        ("two Weary cats",),
    ]
    assert KINDS["style"].target_prompts(["a picture"], ["ink"], "picture", STYLE) == [
        ("a picture in the style of ink", "a picture, ink style")
    ]
    assert KINDS["nudity"].target_prompts(["a man"], ["nude", "naked"], "man", ["{target}, {prompt}"]) == [
        ("nude, a man", "naked, a man")
    ]
    with pytest.raises(PromptsError, match="doesn't make target prompts from"):
        KINDS["memorization"].target_prompts(["x"], ["a"], "b", [])


def test_each_of_several_targets_has_its_prompts():
    assert KINDS["object"].target_prompts(["a cat"], ["weary cat", "owl"], "cat", []) == [
        ("a weary cat", "an owl")
    ]
    (styled,) = KINDS["style"].target_prompts(["x"], ["ink", "neon"], "picture", STYLE)
    assert styled == ("x in the style of ink", "x, ink style", "x in the style of neon", "x, neon style")


def test_golden_probe_prompts():
    def made(kind, role, subject, anchor, template):
        return KINDS[kind].probe_prompts(
            role, subject, anchor, [template], {}, "{prompt} in the style of {target}"
        )

    assert made("object", "target", "owl", "bird", "a {subject}") == ["an owl"]
    assert made("object", "anchor", "bird", "bird", "a {subject}") == ["a bird"]
    assert made("style", "anchor", "picture", "picture", "a picture of a cat") == ["a picture of a cat"]
    styled = ["a picture of a cat in the style of ink"]
    assert made("style", "target", "ink", "picture", "a picture of a cat") == styled
    assert made("style", "neighbor", "ink", "picture", "a picture of a cat") == styled
    assert made("memorization", "target", "The Poster", "moon", "print of {subject}") == [
        "print of The Poster"
    ]
    assert made("memorization", "neighbor", "sun", "moon", "a {subject}") == ["a sun"]
    assert made("nudity", "target", "nude", "man", "a {subject}") == ["a man in the style of nude"]
    assert made("nudity", "neighbor", "woman", "man", "a {subject}") == ["a woman"]


def test_the_published_templates_have_names():
    compvis, diffusers = KINDS["style"].templates("compvis"), KINDS["style"].templates("diffusers")
    assert (
        len(compvis) == 6 and sum("{target} {target}" in form for form in compvis) == 3
    )  # doubled half of the time
    assert len(diffusers) == 3 and len(set(diffusers)) == 2  # two branches of it are identical
    assert KINDS["nudity"].templates("compvis") == KINDS["inappropriate"].templates("diffusers")
    assert len(set(KINDS["nudity"].templates("diffusers"))) == 3
    assert KINDS["style"].templates(["{prompt} by {target}"]) == ["{prompt} by {target}"]
    for wrong in ("paper", ["no slots"], ["{prompt} {targets}"]):
        with pytest.raises(PromptsError, match="allowed|needs"):
            KINDS["style"].templates(wrong)


def test_has_word():
    assert has_word("Two CATS", "cat") and has_word("cat.", "cat")
    assert not has_word("catalogue, bobcat, cat-like", "cat")


def test_prompt_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff# head\n\n a cat \r\na cat\ntwo cats\n".encode())
    assert read_templates(path) == ["a cat", "two cats"]
    for content, wanted in [(b"# none\n", "holds no prompt"), (b"caf\xe9", "byte 0xe9 is not UTF-8")]:
        path.write_bytes(content)
        with pytest.raises(PromptsError, match=wanted):
            read_templates(path)
    with pytest.raises(PromptsError, match="can't be read"):
        read_templates(tmp_path / "none.txt")


def test_the_stage_writes_prompts_and_refuses_a_changed_file(tmp_path):
    path, out = tmp_path / "p.txt", tmp_path / "out" / "p.json"
    path.write_text("a {subject}\n")
    spec = {"kind": "object", "anchor": "owl", "source": file_source(path), "slots": {}, "count": 5}
    write_prompts(spec, out)
    assert json.loads(out.read_text()) == {"kind": "object", "anchor": "owl", "prompts": ["an owl"]}
    path.write_text("the {subject}\n")
    with pytest.raises(PromptsError, match="was changed after this run was planned"):
        write_prompts(spec, out)
