"""Malformed tables and configs: each gives the one clear error, none a traceback, none a plan.

A few hundred examples by default; `make fuzz` (marker `fuzz`) tries 5,000.
"""

import copy
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from concept_ablation.plan.graph import PlanError
from concept_ablation.plan.schema import ConfigError, read_config
from concept_ablation.plan.settings import merge
from concept_ablation.plan.specs import load_plan
from concept_ablation.plan.table import ConceptsError, hidden

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "workflow" / "schemas"
CONFIG = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
GOOD = b"kind,target,anchor,neighbors,steps\nobject,pouting cat,cat,weary cat,10\n"
FEW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
MANY = settings(FEW, max_examples=1700, derandomize=False)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The shipped config in a folder of its own, with stand-ins for the models; the working directory."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    (folder / "config").symlink_to(ROOT / "config")
    for name in ("emoji-diffusion", "emoji-clip", "emoji-copy"):
        (folder / "embedded" / name).mkdir(parents=True)
        (folder / "embedded" / name / "weights.safetensors").write_bytes(bytes(1000))
    os.chdir(folder)
    yield folder
    os.chdir(before)


def plan_table(content: bytes) -> str | None:
    """What is said of a table, or None if there is a plan of it. Any error of another kind goes through."""
    Path("concepts.csv").write_bytes(content)
    try:
        load_plan(CONFIG, SCHEMAS, "config.yaml")
    except (ConceptsError, PlanError) as error:
        return str(error)
    return None


def plan_config(content: bytes) -> str | None:
    """The same of a config file over the shipped config, with a good table."""
    Path("concepts.csv").write_bytes(GOOD)
    Path("own.yaml").write_bytes(content)
    try:
        config = copy.deepcopy(CONFIG)
        merge(config, read_config("own.yaml"))
        load_plan(config, SCHEMAS, "own.yaml")
    except (ConceptsError, ConfigError, PlanError) as error:
        return str(error)
    return None


def check_told(said: str | None, file: str) -> None:
    """It was refused, on few and printable lines that name the file."""
    assert said is not None, "a plan of a malformed file"
    assert file in said
    assert not hidden(said.replace("\n", "")), said
    assert max(map(len, said.splitlines())) < 2000


def test_the_good_table_and_an_empty_overlay_give_a_plan(folder):
    assert plan_table(GOOD) is None and plan_config(b"{}") is None


# Tables. Each of these makes a good table bad, whatever the text that it is given.
HOSTILE = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["$(touch x)", "`x`", "../../x", "=1+1", "a" * 10_000, "\u202eowl", "<b>", "{subject}"]),
)


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


BAD_TABLES = st.one_of(
    # Bytes that are not UTF-8, after the header or in it.
    st.tuples(
        st.binary(max_size=30), st.sampled_from([b"\xff", b"\xc3(", b"\x80"]), st.binary(max_size=30)
    ).map(lambda parts: GOOD + b"".join(parts)),
    # Control characters, invisible ones and line ends in a value.
    st.tuples(
        HOSTILE, st.sampled_from("\x00\x01\x07\x1b\x7f\x85\u202e\u2066\u200f\u2028\ufeff"), HOSTILE
    ).map(
        lambda parts: (
            GOOD + f"object,{cell('x' + parts[0] + parts[1] + 'x')},bird,,\n".encode("utf-8", "replace")
        )
    ),
    # A quote that isn't closed, and one in the middle.
    HOSTILE.map(
        lambda text: (
            GOOD
            + ('object,"' + text.replace('"', "").replace("\n", "").replace("\r", "") + ",bird,,\n").encode(
                "utf-8", "replace"
            )
        )
    ),
    # No number, or one out of bounds.
    st.one_of(
        st.sampled_from(
            ["nan", "inf", "-inf", "1e400", "0", "-1", "1.5", "2024-01-01", "9" * 5000, "0x10", "=1"]
        ),
        st.integers(max_value=0).map(str),
        st.integers(min_value=1_000_001).map(str),
        st.text(min_size=1, max_size=20, alphabet="abc.-+e$`'"),
    ).map(lambda text: f"kind,target,anchor,steps\nobject,owl,bird,{cell(text)}\n".encode()),
    # An unknown kind, a column that doesn't exist, a row of too many values.
    st.text(min_size=1).map(
        lambda text: f"kind,target,anchor\n{cell('x' + text)},owl,bird\n".encode("utf-8", "replace")
    ),
    st.text(min_size=1).map(
        lambda text: (
            f"kind,target,anchor,{cell('x' + text)}\n".encode("utf-8", "replace") + b"object,owl,bird,1\n"
        )
    ),
    st.integers(1, 50).map(lambda count: GOOD + b"object,owl,bird,,5" + b",x" * count + b"\n"),
    # Missing values, repeated rows, other separators, too long, files that aren't there.
    st.sampled_from(
        [
            ",,,,",
            "object,,bird,,",
            "object,owl,,,",
            ",owl,bird,,",
            "object,cat,cat,,",
            GOOD.decode().split("\n")[1],
        ]
    ).map(lambda row: GOOD + row.encode() + b"\n"),
    st.integers(201, 20_000).map(lambda length: GOOD + b"object," + b"a" * length + b",bird,,\n"),
    st.sampled_from([b";", b"\t"]).map(lambda mark: GOOD.replace(b",", mark)),
    st.tuples(st.sampled_from(["prompts", "delta"]), st.text(min_size=1)).map(
        lambda parts: f"kind,target,anchor,{parts[0]}\nobject,owl,bird,{cell('no/' + parts[1])}\n".encode(
            "utf-8", "replace"
        )
    ),
    st.sampled_from(
        [
            b"",
            b"\n",
            b"\xef\xbb\xbf",
            b"#\n",
            b"\x00",
            b"\x00" * 5000,
            GOOD.split(b"\n")[0],
            b"\xff\xfe" + "kind".encode("utf-16-le"),
        ]
    ),
)

# Anything at all: most of it is malformed; what isn't may give a plan, but never another error.
ANY_TABLE = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=100).map(lambda data: GOOD + data),
    st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=8), st.integers(0, 8)).map(
        lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] + cut[2] :]
    ),
    st.lists(st.lists(HOSTILE, max_size=7), max_size=5).map(
        lambda rows: (
            "kind,target,anchor,neighbors,steps,prompts,concept\n"
            + "\n".join(",".join(map(cell, row)) for row in rows)
        ).encode("utf-8", "replace")
    ),
)

# Configs: every value of the shipped config, replaced by one of another type.


def leaves(part: dict, path: tuple = ()) -> list[tuple]:
    found = []
    for key, value in part.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]
    return found


LEAVES = [path for path in leaves(CONFIG) if path[0] not in ("kinds", "presets")]
WRONG = [
    ".nan", ".inf", "-.inf", "2024-01-01", "2024-01-01 10:00:00", "!!binary aGk=", "!!set {a, b}", "{}", "{a: 1}", "[[]]", "[1, {a: 2}]",
    '"\\0"', '"\\ud800"', '"\\e[31m"', "-99999999999999999999", "1" + "0" * 400, "0x" + "f" * 5000, "!!omap [a: 1]",
]  # fmt: skip


def overlay(path: tuple, value: str) -> bytes:
    return (
        "{" + "".join(f"{key}: {{" for key in path[:-1]) + f"{path[-1]}: {value}" + "}" * len(path)
    ).encode()


BAD_CONFIGS = st.one_of(
    st.tuples(st.sampled_from(LEAVES), st.sampled_from(WRONG)).map(lambda pair: overlay(*pair)),
    # Keys that don't exist, or aren't texts.
    st.tuples(st.sampled_from(LEAVES), st.text(min_size=1, alphabet="abcxyz_-")).map(
        lambda pair: overlay((*pair[0][:-1], "x" + pair[1]), "1") if pair[0][:2] != ("prompts", "slots") else b"xx: 1"
    ),
    st.sampled_from([b"1: 2", b"null: 2", b"? [a]\n: 1", b"? {a: 1}\n: 1", b"2024-01-01: 1", b"true: 1", b".nan: 1"]),
    # No YAML, no UTF-8, no group.
    st.binary(max_size=30).map(lambda data: b"results: \xff" + data),
    st.sampled_from([b"results: [", b"results: 'x", b"\tresults: x", b"a: b: c", b"- 1", b"text", b"5", b"results: \x00", b"results: !!python/object/apply:os.system [true]", b"*x", b"results: &a [*a]", b"results: &a {b: *a}", b"&a [*a]", b"%YAML 9.9\n---\na", b"results: x\n---\nresults: y", b"results: 1" + b"0" * 5000, b"results: 2024-13-45", b"<<: 1", b"results: !!int x", b"results: !!float x", b"results: !!timestamp x", b"results: !!binary ==="]),
    # A key twice.
    st.sampled_from(LEAVES).map(lambda path: b"results: a\nconcepts: concepts.csv\nresults: b\n# " + repr(path).encode()),
    # Bombs of aliases, and of depth.
    st.tuples(st.integers(12, 60), st.sampled_from(["[{0}, {0}]", "{{x: {0}, y: {0}}}"])).map(
        lambda pair: "\n".join(
            ["a0: &a0 [x]", *(f"a{i}: &a{i} " + pair[1].format(f"*a{i - 1}") for i in range(1, pair[0]))]
        ).encode()
    ),
    st.integers(51, 3000).map(lambda depth: b"results: " + b"[" * depth + b"]" * depth),
)  # fmt: skip
ANY_CONFIG = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.sampled_from(LEAVES), st.text(max_size=30)).map(lambda pair: overlay(pair[0], yaml.safe_dump(pair[1], default_style='"', width=10**6).strip())),
    st.tuples(st.sampled_from(LEAVES), st.one_of(st.integers(), st.floats(), st.booleans())).map(lambda pair: overlay(pair[0], yaml.safe_dump(pair[1]).split("\n")[0])),
)  # fmt: skip


def try_bad_table(content):
    check_told(plan_table(content), "concepts.csv")


def try_any_table(content):
    said = plan_table(content)
    assert said is None or "concepts.csv" in said


def try_bad_config(content):
    check_told(plan_config(content), "own.yaml")


def try_any_config(content):
    plan_config(content)


@FEW
@given(BAD_TABLES)
def test_a_malformed_table_gives_one_clear_error(content):
    try_bad_table(content)


@FEW
@given(ANY_TABLE)
def test_any_bytes_give_a_plan_or_a_clear_error(content):
    try_any_table(content)


@FEW
@given(BAD_CONFIGS)
def test_a_malformed_config_gives_one_clear_error(content):
    try_bad_config(content)


@FEW
@given(ANY_CONFIG)
def test_any_config_gives_a_plan_or_a_clear_error(content):
    try_any_config(content)


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("strategy", "attempt"),
    [
        (BAD_TABLES, try_bad_table),
        (BAD_CONFIGS, try_bad_config),
        (ANY_TABLE, try_any_table),
        (ANY_CONFIG, try_any_config),
    ],
    ids=["bad tables", "bad configs", "any tables", "any configs"],
)
def test_thousands(strategy, attempt):
    tried = 0

    @MANY
    @given(strategy)
    def run(content):
        nonlocal tried
        tried += 1
        attempt(content)

    run()
    print(f"{tried} examples")
