"""The prompt linter: each check finds its mistake and nothing else, from both forms of a tokenizer's files."""

import subprocess
import sys
import time

import pytest
from tiny import make_tiny_tokenizer

from concept_ablation.plan.lint import Finding, LintRow, format_findings, lint_rows
from concept_ablation.prompts.tokenizer import TokenizerError, load_tokens
from concept_ablation.prompts.wording import replace_word

EMBEDDED = "embedded/emoji-diffusion"
CATS = ["a cat", "a cat on a wall", "two cats"]


def row(line=2, targets=("grumpy cat",), prompts=CATS, made=None, kind="object", anchor="cat", **more):
    made = [[replace_word(prompt, anchor, targets[0])] for prompt in prompts] if made is None else made
    return LintRow(
        line, "row", kind, list(targets), anchor, anchor_prompts=prompts, target_prompts=made, **more
    )


def lint(rows, folder=None):
    return lint_rows(rows, folder and load_tokens(folder))


def codes(rows, folder=None):
    return [(finding.level, finding.code) for finding in lint(rows, folder)]


def message(one, folder=None):
    (finding,) = lint([one], folder)
    return finding.message


def test_a_good_row_and_one_without_known_prompts_have_no_finding():
    assert (
        lint_rows([row(neighbors=["black cat", "dog"]), LintRow(3, "x", "style", ["ink"], "picture")], None)
        == []
    )


def test_pairs_that_teach_nothing():
    some = row(made=[["a grumpy cat"], ["A cat on a wall"], ["two grumpy cats"]])
    assert codes([some]) == [("warning", "no-op")]
    assert message(some).startswith("1 of 3 target prompts") and "'a cat on a wall'" in message(some)
    assert codes([row(made=[[prompt] for prompt in CATS])]) == [("error", "no-op")]


def test_prompts_without_the_anchor_word_matter_to_objects():
    prompts, made = ["a cat", "a delicate vase"], [["a grumpy cat"], ["another vase"]]
    assert codes([row(prompts=prompts, made=made)]) == [("warning", "no-anchor-word")]
    assert "1 of 2" in message(row(prompts=prompts, made=made))
    assert codes([row(prompts=prompts[1:], made=made[1:])]) == [("error", "no-anchor-word")]
    assert codes([row(kind="style", prompts=prompts, made=made)]) == []


def test_targets_in_anchor_prompts():
    one = row(targets=["owl", "puppy"], prompts=["a cat", "a cat and Puppies", "a bowl, a cat"], made=[])
    assert codes([one]) == [("warning", "target-in-anchor")]
    assert "1 of 3 anchor prompts contain the target 'puppy'" in message(one)


def test_repeated_prompts():
    twice = row(prompts=["a cat", "A  cat", "two cats"])
    assert codes([twice]) == [("warning", "duplicate")] and "1 of 3 anchor prompts" in message(twice)
    probes = row(probe_prompts={"dog": ["a dog", "a dog"], "cat": CATS})
    assert "1 of 2 evaluation (dog) prompts" in message(probes)
    forms = row(made=[["a grumpy cat"] * 2, ["one", "two"], ["one"]])
    assert "1 of 3 anchor prompts have the same target prompt twice" in message(forms)


def test_neighbors_that_are_the_target_or_the_anchor_in_another_form_or_hold_the_target():
    neighbors = ["Cats", "grumpy cats", "very grumpy cat", "black cat", "grumpy", "concatenation"]
    found = lint_rows([row(neighbors=neighbors)], None)
    assert [(finding.level, finding.code) for finding in found] == [("warning", "neighbor")] * 3
    assert "'Cats' is the anchor 'cat' in another form" in found[0].message
    assert "'grumpy cats' is the target" in found[1].message
    assert "'very grumpy cat' contains the target" in found[2].message


@pytest.fixture(params=["tokenizer.json", "vocab.json and merges.txt"])
def tiny(request, tmp_path):
    """A model folder whose tokenizer spells: one token a byte, 77 with both ends."""
    make_tiny_tokenizer(tmp_path / "tokenizer")
    if request.param != "tokenizer.json":
        (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    return tmp_path


def test_prompts_longer_than_the_model_reads(tiny):
    fits, long = "a cat " + "x" * 71, "a cat " + "x" * 72  # spaces are no tokens: 75 and 76
    assert codes([row(prompts=[fits], made=[["a grumpy cat"]])], tiny) == []
    one = row(prompts=[fits, long], made=[["a grumpy cat"], ["two grumpy cats"]])
    assert codes([one], tiny) == [("warning", "truncated")]
    assert "1 of 2 anchor prompts have more than the 77 tokens" in message(one, tiny)
    assert "the longest 78" in message(one, tiny)
    target = row(prompts=[fits], made=[["grumpy " + fits, "short"]])
    assert "1 of 2 target prompts" in message(target, tiny)
    assert "evaluation (dog)" in message(row(probe_prompts={"dog": ["é" * 40]}), tiny)


def test_a_target_beyond_the_end_is_a_pair_that_teaches_nothing(tiny):
    prompt = "a cat " + "x" * 71
    style = row(kind="style", prompts=[prompt, "a cat"], made=[[prompt + " in ink"], ["a cat in ink"]])
    assert codes([style], tiny) == [("warning", "no-op"), ("warning", "truncated")]
    alone = row(kind="style", prompts=[prompt], made=[[prompt + " in ink"]])
    assert codes([alone], tiny)[0] == ("error", "no-op")


def test_tokens_are_counted_as_transformers_counts_them(tiny):
    from transformers import CLIPTokenizer

    for folder, path in ((tiny, tiny / "tokenizer"), (EMBEDDED, EMBEDDED + "/tokenizer")):
        ours, theirs = load_tokens(folder), CLIPTokenizer.from_pretrained(path)
        for prompt in (
            "A cat's  picture, it's 1999!",
            "Müller 葛飾北斎 — naïve",
            "",
            "pouting cat in the rain" * 9,
        ):
            ids = theirs(prompt)["input_ids"]
            assert ours.count(prompt) == len(ids)
            assert ours.read(prompt) == ids[1:-1][: ours.limit - 2]
        assert ours.limit == theirs.model_max_length


def test_words_that_the_tokenizer_spells_are_unknown(tiny):
    words = "pouting cat, lovestruck blueprint Strawberry r2d2 c-3po jj xqzvpt 葛飾北斎"
    unknown = load_tokens(EMBEDDED).unknown(words)
    assert [word for word, _ in unknown] == ["xqzvpt", "葛飾北斎"]
    assert "'xqzvpt' (6 tokens)" in message(row(targets=["xqzvpt"]), EMBEDDED)
    assert load_tokens(tiny).unknown(words) == []  # spells every word: says nothing about any


def test_the_unknown_token_tells_too(tmp_path):
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.WordLevel({"cat": 0, "<unk>": 1}, unk_token="<unk>"))
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"max_position_embeddings": 40}')
    tokens = load_tokens(tmp_path)
    assert tokens.unknown("cat snoopy") == [("snoopy", 1)] and tokens.limit == 40


def test_a_folder_whose_tokenizer_cant_be_read_is_named(tmp_path):
    with pytest.raises(
        TokenizerError, match=f"{tmp_path} holds no readable tokenizer .*vocab.json and merges.txt, is needed"
    ):
        load_tokens(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=f"{tmp_path}/tokenizer holds no readable tokenizer"):
        load_tokens(tmp_path)


def test_findings_are_shown_by_line_and_equal_ones_once():
    findings = [
        Finding(9, "c", "warning", "duplicate", "b"),
        Finding(3, "a", "warning", "duplicate", "b"),
        Finding(3, "a", "error", "no-op", "z"),
        *(Finding(line, "a", "warning", "truncated", "many") for line in range(10, 20)),
    ]
    assert format_findings(findings, "concepts.csv").splitlines() == [
        "concepts.csv:3: error: z",
        "concepts.csv:3: warning: b (also line 9)",
        "concepts.csv:10: warning: many (also lines 11, 12, 13, 14, 15 and 4 more)",
    ]
    assert format_findings([], "concepts.csv") == ""


def test_a_run_shows_a_few_warnings_of_a_kind_and_counts_the_rest():
    unknown = [Finding(line, "a", "warning", "unknown-word", f"word {line}") for line in range(2, 12)]
    others = [
        Finding(20, "b", "warning", "duplicate", "b"),
        *(Finding(n, "c", "error", "no-op", f"{n}") for n in range(30, 40)),
    ]
    shown = format_findings([*unknown, *others], "t.csv", most=3).splitlines()
    assert shown[:4] == [
        *(f"t.csv:{line}: warning: word {line}" for line in (2, 3, 4)),
        "t.csv:20: warning: b",
    ]
    assert len([line for line in shown if ": error: " in line]) == 10
    assert (
        shown[-1]
        == "t.csv: 7 more warnings like these (unknown-word); python -m concept_ablation check lists all"
    )
    assert len(format_findings(unknown, "t.csv").splitlines()) == 10


def test_it_needs_no_torch_and_a_thousand_rows_take_a_second():
    code = (
        "import sys; from concept_ablation.plan import lint; from concept_ablation.prompts import tokenizer;"
    )
    code += "lint.lint_rows([], tokenizer.load_tokens(sys.argv[1]));"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, EMBEDDED], check=True)
    prompts = [f"a picture of a cat with {number} hats, on a red wall" for number in range(200)]
    rows = [
        row(line, [f"owl {line}"], prompts, [[f"{p}, owl {line}"] for p in prompts]) for line in range(1000)
    ]
    started = time.process_time()
    assert lint(rows, EMBEDDED) == []
    assert time.process_time() - started < 2  # measured: 0.2
