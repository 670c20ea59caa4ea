"""The table of concepts: what it reads, and that every mistake is told with its line, column and what is allowed."""

from pathlib import Path

import pytest

from concept_ablation.plan.concept import Concept, slug
from concept_ablation.plan.schema import ConfigError, check_config, load_schema
from concept_ablation.plan.table import ConceptsError, load_concepts

SCHEMAS = Path(__file__).parents[1] / "workflow" / "schemas"
CONCEPTS, CONFIG = (load_schema(SCHEMAS / f"{name}.schema.yaml") for name in ("concepts", "config"))


def load(tmp_path, content):
    path = tmp_path / "concepts.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_concepts(path, CONCEPTS, CONFIG)


def errors(tmp_path, content):
    """The messages, each without the file's folder and indentation; the heading left out."""
    with pytest.raises(ConceptsError) as caught:
        load(tmp_path, content)
    lines = str(caught.value).splitlines()[1:]
    return [line.strip().removeprefix(str(tmp_path) + "/") for line in lines]


def test_reads_a_row_in_any_column_order(tmp_path):
    rows = load(tmp_path, "target,neighbors,kind,anchor\nowl,penguin; rooster ;duck,object,bird\n")
    assert rows == [Concept("object-owl", "object", ("owl",), "bird", ("penguin", "rooster", "duck"), line=2)]


def test_overrides_get_the_type_and_bounds_of_the_config_key(tmp_path):
    text = "kind,target,anchor,steps,learning_rate,training.prior_preservation,parameter_group\nobject,a,b,7,1e-4,yes,attn\n"
    assert load(tmp_path, text)[0].overrides == {
        "training.steps": 7,
        "training.learning_rate": 1e-4,
        "training.prior_preservation": True,
        "training.parameter_group": "attn",
    }


def test_any_value_of_the_config_has_a_dotted_column(tmp_path):
    text = "kind,target,anchor,training.hflip,anchors.sampler.steps,evaluation.images.target\nobject,a,b,0.2,9,7\n"
    assert load(tmp_path, text)[0].overrides == {
        "training.hflip": 0.2,
        "anchors.sampler.steps": 9,
        "evaluation.images.target": 7,
    }
    (message,) = errors(tmp_path, "kind,target,anchor,training.hflip\nobject,a,b,2\n")
    assert message.startswith("concepts.csv:2: column 'training.hflip': 2.0 must be at most 1")
    (message,) = errors(tmp_path, "kind,target,anchor,training.hflap\nobject,a,b,0\n")
    assert "unknown column 'training.hflap' (did you mean 'training.hflip'?)" in message
    (message,) = errors(tmp_path, "kind,target,anchor,steps,training.steps\nobject,a,b,1,2\n")
    assert "column 'steps': occurs twice in the header, as 'training.steps'" in message


def test_several_targets_are_separated_by_semicolons_but_not_in_a_caption(tmp_path):
    rows = load(
        tmp_path, "kind,target,anchor,image\nstyle,ink; neon,picture,\nmemorization,One; two,moon,m.png\n"
    )
    assert [(row.targets, row.target, row.name) for row in rows] == [
        (("ink", "neon"), "ink; neon", "style-ink-neon"),
        (("One; two",), "One; two", "memorization-one-two"),
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_comments_blank_lines_bom_and_line_ends(tmp_path, bom, end):
    lines = [
        "# head",
        "kind,target,anchor",
        "",
        "object,owl,bird",
        "  # object,cat,animal",
        'object,"a, b",c',
    ]
    rows = load(tmp_path, bom + end.join(lines).encode())
    assert [(row.target, row.line) for row in rows] == [("owl", 4), ("a, b", 6)]


def test_disabled_rows_are_left_out(tmp_path):
    rows = load(tmp_path, "kind,target,anchor,enabled\nstyle,x,y,no\nobject,owl,bird,yes\nobject,a,b,\n")
    assert [row.target for row in rows] == ["owl", "a"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ["concepts.csv:1: has no header line (allowed: concept, kind, target"]),
        ("kind,target,anchor\n# only\n", ["concepts.csv:1: has no row below its header"]),
        ("kind,target,anchor,enabled\nobject,a,b,no\n", ["concepts.csv:1: has no row that is enabled"]),
        (
            "kind;target;anchor\nobject;a;b\n",
            ["concepts.csv:1: separates columns by ';' or tabs (allowed: commas"],
        ),
        (
            b"kind,target,anchor\nobject,caf\xe9,b\n",
            ["concepts.csv:2: byte 0xe9 is not UTF-8 (allowed: UTF-8"],
        ),
        ("kind,target,anchor\n".encode("utf-16"), ["concepts.csv:1: byte 0xff is not UTF-8"]),
        (
            "kind,targt,anchor\nobject,a,b\n",
            [
                "concepts.csv:1: unknown column 'targt' (did you mean 'target'?)",
                "concepts.csv:1: column 'target' is missing",
            ],
        ),
        (
            "kind,target,anchor,kind\nobject,a,b,object\n",
            ["concepts.csv:1: column 'kind': occurs twice in the header"] * 2,
        ),
        (
            "kind,target,anchor\nstyel,a,b\n",
            ["concepts.csv:2: column 'kind': 'styel' is not one of style, object"],
        ),
        ("kind,target,anchor\nobject,,b\n", ["concepts.csv:2: column 'target': is empty"]),
        (
            "kind,target,anchor\nobject,Cat,cat\n",
            ["concepts.csv:2: column 'anchor': 'cat' is the target itself"],
        ),
        (
            "kind,target,anchor\nobject,a\0b,c\n",
            [
                "concepts.csv:2: column 'target': holds the invisible character U+0000 (allowed: visible characters)"
            ],
        ),
        (
            "kind,target,anchor\nobject,a,b,c\n",
            ["concepts.csv:2: has 4 values under 3 columns; quote a value"],
        ),
        ('kind,target,anchor\nobject,"a,b\n', ["concepts.csv:2: is not valid CSV"]),
        (
            "kind,target,anchor\nmemorization,a,b\n",
            ["concepts.csv:2: column 'image': is empty (allowed: kind memorization needs the path"],
        ),
        (
            "kind,target,anchor,image\nobject,a,b,c.png\n",
            ["concepts.csv:2: column 'image': is only for kind memorization (allowed: leave it empty)"],
        ),
        (
            "kind,target,anchor\nobject,a;b;A,c\n",
            ["concepts.csv:2: column 'target': 'a' occurs twice (allowed: each target once)"],
        ),
        (
            "kind,target,anchor\nobject,a;b,B\n",
            ["concepts.csv:2: column 'anchor': 'B' is the target itself"],
        ),
        (
            "kind,target,anchor,steps\nobject,a,b,many\n",
            ["concepts.csv:2: column 'steps': 'many' is not a whole number"],
        ),
        (
            "kind,target,anchor,steps\nobject,a,b,0\n",
            ["concepts.csv:2: column 'steps': 0 must be at least 1"],
        ),
        (
            "kind,target,anchor,learning_rate\nobject,a,b,nan\n",
            ["concepts.csv:2: column 'learning_rate': 'nan' is not a"],
        ),
        (
            "kind,target,anchor,neighbors\nobject,a,b,A;b;c;C\n",
            [
                "concepts.csv:2: column 'neighbors': 'A' is the target",
                "concepts.csv:2: column 'neighbors': 'b' is the anchor",
                "concepts.csv:2: column 'neighbors': 'C' occurs twice",
            ],
        ),
        (
            "concept,kind,target,anchor\nx,object,a,b\nX,object,c,b\n",
            ["concepts.csv:3: column 'concept': 'X' is the name of line 2 (allowed: a name of its own)"],
        ),
        (
            "concept,kind,target,anchor\nx,object,a,b\ny,object,A,b\n",
            ["concepts.csv:3: column 'target': 'A' -> 'b' is the same work as line 2"],
        ),
    ],
)
def test_a_mistake_is_told_with_line_column_value_and_what_is_allowed(tmp_path, content, wanted):
    found = errors(tmp_path, content)
    assert len(found) == len(wanted), found
    for message, start in zip(found, wanted, strict=True):
        assert message.startswith(start), message


def test_all_mistakes_of_a_table_are_told_together(tmp_path):
    found = errors(tmp_path, "kind,target,anchor,steps\nstyel,a,b,x\nobject,,b,1\nobject,owl,owl,-1\n")
    assert [message.split(": ")[0] for message in found] == [
        "concepts.csv:2",
        "concepts.csv:2",
        "concepts.csv:3",
        "concepts.csv:4",
        "concepts.csv:4",
    ]


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ConceptsError, match="No such file.*set `concepts` in the config"):
        load_concepts(tmp_path / "none.csv", CONCEPTS, CONFIG)


@pytest.mark.parametrize(
    ("text", "wanted"), [("Pouting Cat!", "pouting-cat"), ("../é;rm -rf", "rm-rf"), ("猫", "x")]
)
def test_slugs_are_safe_file_names(text, wanted):
    assert slug(text) == wanted


def test_config_errors_are_listed_with_their_key_path():
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["results"],
        "properties": {
            "results": {"type": "string"},
            "training": CONFIG["properties"]["training"] | {"required": []},
        },
    }
    config = {"training": {"stepz": 1, "steps": 0, "loss": "model-base", "learning_rate": "1e-4"}}
    with pytest.raises(ConfigError) as caught:
        check_config(config, schema, "my.yaml")
    assert str(caught.value).splitlines() == [
        "my.yaml: 4 errors",
        "  results: is missing",
        "  training.loss: 'model-base' is not one of model-based, noise-based (did you mean 'model-based'?)",
        "  training.steps: 0 must be at least 1",
        "  training.stepz: unknown key (did you mean 'steps'?)",
    ]


def test_numbers_that_yaml_reads_as_text_become_numbers():
    schema = {
        "properties": {"a": {"type": "number"}, "b": {"type": ["integer", "null"]}, "c": {"type": "string"}}
    }
    assert check_config({"a": "1e-4", "b": "null", "c": "7"}, schema, "x") == {"a": 1e-4, "b": None, "c": "7"}


def test_a_settings_last_name_is_told_with_its_path(tmp_path):
    (message,) = errors(tmp_path, "kind,target,anchor,hflip\nobject,a,b,0.5\n")
    assert "unknown column 'hflip' (did you mean 'training.hflip'?)" in message
