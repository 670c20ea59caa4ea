"""Trying rows: the pictures are the report's, strengths and sums are what the page says, and what a reader gives is checked."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concept_ablation.common.image_store import read_store
from concept_ablation.demo.catalogue import make_catalogue
from concept_ablation.demo.request import SEEDS, Picture, Request, RequestError, answer, pictures_of
from concept_ablation.demo.server import Guard
from concept_ablation.demo.strip import caption, strip, tile
from concept_ablation.demo.studio import Recent, Studio, mix
from concept_ablation.diffusion.delta import DeltaError, apply_delta, delta_parameters, load_delta, save_delta
from concept_ablation.diffusion.stages import load_model, sample_ablated, sample_base
from concept_ablation.plan.graph import PlanError
from tests.demo_results import plan_of, write_deltas
from tests.tiny import make_tiny_pipeline

TABLE = """concept,kind,target,anchor,neighbors,bundle
fox,object,fox,animal,dog,both
owl,object,owl,bird,duck,both
rage,inappropriate,angry face,face,cool face,
late,object,pizza,food,apple,
"""
SAMPLER = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0, "precision": "fp32"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan on a tiny model, of which all deltas but that of `late` are there."""
    folder = tmp_path_factory.mktemp("demo")
    make_tiny_pipeline(folder / "model", size=32)
    overlay = {"model": {"path": str(folder / "model")}, "evaluation": {"sampler": SAMPLER}}
    plan, config, _ = plan_of(folder, TABLE, overlay)
    rows = [row.ablation for row in plan.rows if row.concept.name != "late"]
    write_deltas(plan, [*rows, *(bundle.delta for bundle in plan.bundles)])
    return plan, config


@pytest.fixture(scope="module")
def catalogue(planned):
    plan, config = planned
    return make_catalogue(plan, config["evaluation"]["sampler"])


@pytest.fixture(scope="module")
def studio(catalogue):
    return Studio(load_model(catalogue.model, "cpu"))


def pixels(image):
    return np.asarray(image).astype(int)


def weights(studio, path):
    """The values that the studio's pipeline has of what a delta changes."""
    names = load_delta(path)[0]
    own = delta_parameters(studio._pipeline, names)
    return {name: own[name].clone() for name in names}


def test_what_is_finished_is_offered(catalogue):
    assert list(catalogue.choices) == ["fox", "owl", "rage", "bundle both"]
    assert catalogue.choices["fox"].about == "fox → animal · object"
    assert catalogue.choices["bundle both"].about == "bundle both: 2 concepts · closed-form"


def test_nothing_finished_is_told(tmp_path, planned):
    overlay = {"model": dict(planned[1]["model"])}
    plan, config, _ = plan_of(tmp_path, TABLE, overlay)
    with pytest.raises(PlanError, match="none of the 4 rows .* run the workflow first"):
        make_catalogue(plan, config["evaluation"]["sampler"])


def test_rows_of_one_target_are_told_apart(tmp_path, planned):
    table = "concept,kind,target,anchor,neighbors\na,object,fox,animal,dog\nb,object,fox,mammal,dog\n"
    plan, config, _ = plan_of(tmp_path, table, {"model": dict(planned[1]["model"])})
    write_deltas(plan, [row.ablation for row in plan.rows])
    choices = make_catalogue(plan, config["evaluation"]["sampler"]).choices
    assert [choice.short for choice in choices.values()] == ["a", "b"]
    assert choices["b"].about == "fox → mammal · object · b"


@pytest.mark.parametrize("name", ["fox", "rage", "bundle both"])
def test_the_reports_prompts_and_seeds_give_the_reports_pictures(planned, catalogue, studio, tmp_path, name):
    plan, _ = planned
    choice = catalogue.choices[name]
    keys = {
        key for key, spec in plan.specs["sample_ablated"].items() if plan.path(spec["delta"]) == choice.delta
    }
    stores = []
    for key in sorted(keys):
        sample_ablated(
            plan.specs["sample_ablated"][key], choice.delta, tmp_path / key, device="cpu", batch_size=1
        )
        stores.append(read_store(tmp_path / key))
    assert len(choice.examples) >= 2
    for example in choice.examples:
        request = Request(example.prompt, example.seed, (name,))
        *_, (_, drawn) = answer(request, catalogue, studio)
        found = [
            store.image(place)
            for store in stores
            for place, row in enumerate(store.rows)
            if (row["prompt"], row["seed"], row["role"]) == (example.prompt, example.seed, example.role)
        ]
        assert found and np.array_equal(pixels(drawn.image), pixels(found[0])), example.label


def test_the_base_models_picture_is_the_reports_whatever_was_drawn_before(
    planned, catalogue, studio, tmp_path
):
    plan, _ = planned
    row = next(row for row in plan.rows if row.concept.name == "fox")
    spec = plan.specs["sample_base"][row.base["fox"]]
    sample_base(spec, tmp_path / "base.parquet", device="cpu", batch_size=1)
    store = read_store(tmp_path / "base.parquet")
    for place, kept in enumerate(store.rows):
        request = Request(kept["prompt"], kept["seed"], ("owl", "fox", "bundle both"), 1.7)
        *_, drawn = answer(request, catalogue, studio)
        assert drawn[0].title == "base model"
        assert np.array_equal(pixels(drawn[0].image), pixels(store.image(place)))
        assert not np.array_equal(pixels(drawn[0].image), pixels(drawn[1].image))


@pytest.mark.parametrize(
    "strengths",
    [{}, {"fox": 1.0}, {"fox": 0.0}, {"fox": 0.35}, {"fox": 2.5}, {"fox": 1.0, "owl": 0.5, "rage": 2.0}],
)
def test_weights_are_base_and_the_changes_times_their_strengths(catalogue, strengths):
    studio = Studio(load_model(catalogue.model, "cpu"))
    paths = {name: catalogue.choices[name].delta for name in ("fox", "owl", "rage")}
    base = weights(studio, paths["fox"])
    studio._set({path: 3.0 for path in paths.values()})  # whatever was there before
    studio._set({paths[name]: s for name, s in strengths.items()})
    found = weights(studio, paths["fox"])
    for name, value in base.items():
        changes = {one: load_delta(paths[one])[0][name].double() - value.double() for one in strengths}
        wanted = value.double() + sum(s * changes[one] for one, s in strengths.items())
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)
        if strengths in ({}, {"fox": 0.0}):
            assert torch.equal(found[name], value)
        if strengths == {"fox": 1.0}:  # not base + (value - base), which rounds
            assert torch.equal(found[name], load_delta(paths["fox"])[0][name])


def test_one_part_is_exact_at_both_ends():
    draw = torch.Generator().manual_seed(0)
    base, value = (torch.randn(10_000, generator=draw) for _ in range(2))
    assert torch.equal(mix(base, [(value, 0.0)]), base) and torch.equal(mix(base, [(value, 1.0)]), value)
    assert not torch.equal(base + (value - base), value)
    assert mix(base, []) is base


def test_a_delta_is_read_once_and_a_picture_drawn_once(catalogue, monkeypatch):
    from concept_ablation.demo import studio as module

    read, drawn = [], []
    monkeypatch.setattr(module, "apply_delta", lambda *given: (read.append(given[1]), apply_delta(*given)))
    real = module.sample_images
    monkeypatch.setattr(
        module, "sample_images", lambda *given, **named: (drawn.append(given), real(*given, **named))[1]
    )
    studio = Studio(load_model(catalogue.model, "cpu"))
    for strength in (1.0, 0.5, 1.0, 0.5):
        for names in (("fox",), ("fox", "owl")):
            list(answer(Request("a fox", 1, names, strength), catalogue, studio))
    assert len(read) == 2
    assert len(drawn) == 1 + 2 * 3  # the base model's, and of each strength fox, owl, both


def test_a_token_embeddings_rows_come_and_go(catalogue, tmp_path):
    studio = Studio(load_model(catalogue.model, "cpu"))
    table = studio._pipeline.text_encoder.get_input_embeddings().weight
    before = table.detach().clone()
    path = str(tmp_path / "delta.safetensors")
    save_delta(path, {"text_encoder.token_embedding.7": before[7] + 1}, {})
    studio._set({path: 0.5})
    torch.testing.assert_close(table.detach()[7], before[7] + 0.5)
    studio._set({})
    assert torch.equal(table.detach(), before)


def test_a_delta_of_another_model_changes_nothing(catalogue, studio, tmp_path):
    path, fox = str(tmp_path / "other.safetensors"), catalogue.choices["fox"].delta
    name = next(iter(load_delta(fox)[0]))
    save_delta(path, {name: torch.zeros(3)}, {"base_model": "another"})
    studio._set({})
    before = weights(studio, fox)
    with pytest.raises(DeltaError, match="don't fit this model"):
        studio.draw("a fox", 0, catalogue.choices["fox"].sampler, {path: 1.0})
    studio._set({})
    assert all(torch.equal(value, before[name]) for name, value in weights(studio, fox).items())


def test_what_was_used_last_is_kept_up_to_its_bytes():
    made, kept = [], Recent(10, len)
    for key in "aabcab":
        kept.get(key, lambda key=key: made.append(key) or "x" * 5)
    assert made == ["a", "b", "c", "a", "b"]
    assert kept.get("huge", lambda: "x" * 99) == kept.get("huge", lambda: "not again")


@pytest.mark.parametrize(
    "several,titles",
    [
        ("each", ["base model", "without fox", "without owl"]),
        ("added", ["base model", "fox + owl, added up"]),
        ("both", ["base model", "without fox", "without owl", "fox + owl, added up"]),
    ],
)
def test_several_rows_are_shown_each_and_added_up(catalogue, several, titles):
    made = pictures_of(Request("a fox", 0, ("fox", "owl", "fox"), 0.5, several), catalogue)
    assert [picture.title for picture in made] == titles
    one = pictures_of(Request("a fox", 0, ("fox",), several=several), catalogue)
    assert [picture.title for picture in one] == ["base model", "without fox"]


def test_pictures_come_one_after_the_other(catalogue, studio):
    steps = list(answer(Request("a fox", 3, ("fox",)), catalogue, studio))
    assert [[picture.image is not None for picture in step] for step in steps] == [
        [False, False],
        [True, False],
        [True, True],
    ]


@pytest.mark.parametrize(
    "wrong,told",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 1001}, "1001 characters (allowed: 1000)"),
        ({"seed": -1}, "a whole number from 0 to"),
        ({"seed": SEEDS}, "a whole number from 0 to"),
        ({"seed": 0.5}, "a whole number from 0 to"),
        ({"seed": None}, "a whole number from 0 to"),
        ({"strength": 3.1}, "0 to 3 is allowed"),
        ({"strength": float("nan")}, "0 to 3 is allowed"),
        ({"strength": "1"}, "0 to 3 is allowed"),
        ({"several": "all"}, "allowed: each, added, both"),
        ({"names": ("../../etc/passwd",)}, "is no finished row or bundle"),
        ({"names": ("late",)}, "is no finished row or bundle"),
    ],
)
def test_what_cant_be_drawn_is_told(catalogue, wrong, told):
    asked = {"prompt": "a fox", "seed": 0, "names": ("fox",)} | wrong
    with pytest.raises(RequestError) as error:
        pictures_of(Request(**asked), catalogue)
    assert told in str(error.value)


def test_rows_of_different_samplers_are_not_compared(tmp_path, planned):
    table = "concept,kind,target,anchor,neighbors,evaluation.sampler.steps\na,object,fox,animal,dog,3\nb,object,owl,bird,duck,4\n"
    plan, config, _ = plan_of(tmp_path, table, {"model": dict(planned[1]["model"])})
    write_deltas(plan, [row.ablation for row in plan.rows])
    catalogue = make_catalogue(plan, config["evaluation"]["sampler"])
    with pytest.raises(RequestError, match="'a' and 'b' are judged with different samplers .steps 3 and 4."):
        pictures_of(Request("x", 0, ("a", "b")), catalogue)


@pytest.mark.parametrize(
    "prompt,names,veiled",
    [
        ("a fox", ("fox",), False),
        ("a fox", ("fox", "rage"), True),
        ("an angry face in the rain", (), True),
        ("Angry Faces", ("bundle both",), True),
        ("an angry fox", ("bundle both",), False),
    ],
)
def test_unsafe_content_is_veiled_by_its_row_and_by_its_words(catalogue, prompt, names, veiled):
    assert catalogue.is_veiled(prompt, names) is veiled


def test_prompts_that_the_report_asks_an_unsafe_row_with_are_veiled(planned, catalogue):
    targets = [example.prompt for example in catalogue.choices["rage"].examples if example.role == "target"]
    assert targets and all(catalogue.is_veiled(prompt, ()) for prompt in targets)


def test_values_are_text_on_the_page():
    hostile = '<img src=x onerror="alert(1)"> {{constructor}} ${alert(2)} `'
    image = Image.new("RGB", (8, 8))
    made = strip(Request(hostile, 1, (hostile,)), [Picture(hostile, {}, image)], True, hostile)
    assert "<img src=x" not in made and not set("{}$`") & set(made)
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt; &#123;&#123;constructor" in made


def test_a_veiled_tile_holds_no_picture():
    """Two pictures that differ in all detail and in no quarter's mean give the same tile; unveiled they don't."""
    rows, columns = np.indices((64, 64))
    checks = [
        Image.fromarray(np.uint8(255 * ((rows + columns + odd) % 2)), "L").convert("RGB") for odd in (0, 1)
    ]
    tiles = {
        veiled: [pixels(tile([Picture("", {}, one)], veiled)) for one in checks] for veiled in (False, True)
    }
    assert np.abs(tiles[True][0] - tiles[True][1]).max() <= 1
    big = [Image.fromarray(np.uint8(255 * ((rows // 32 + odd) % 2)), "L").convert("RGB") for odd in (0, 1)]
    assert (
        np.abs(
            pixels(tile([Picture("", {}, big[0])], False)) - pixels(tile([Picture("", {}, big[1])], False))
        ).max()
        > 200
    )


def test_a_tiles_words_name_what_it_shows():
    pictures = [Picture(f"p{number}", {}, None) for number in range(6)]
    assert (
        caption(Request("a fox", 5, ("a",), 0.5), pictures)
        == "a fox · seed 5: p0 | p1 | p2 | p5 and 2 more, strength 0.5"
    )


def ask(path, method="GET", folder="/tmp/made", **headers):
    """The guard's answer: a status, or `through` where the app behind it is asked."""
    said = []

    async def app(scope, receive, send):
        said.append("through")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        said.append(message)

    named = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in named.items()]
    asyncio.run(Guard(app, 7860, folder)(scope, None, send))
    if said[0] == "through":
        assert b"content-security-policy" in dict(said[1]["headers"])
        return "through"
    return said[0]["status"]


def test_the_guard_lets_the_pages_own_requests_through(tmp_path):
    (tmp_path / "a.png").touch()
    assert ask("/") == ask("/assets/index.js") == ask("/gradio_api/queue/data") == "through"
    assert ask("/", host="localhost:7860") == "through"
    assert ask("/gradio_api/queue/join", "POST", origin="http://127.0.0.1:7860") == "through"
    assert ask(f"/gradio_api/file={tmp_path}/a.png", folder=tmp_path) == "through"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=/tmp/made/../secret",
        "/gradio_api/file=/tmp/made-elsewhere/x",
        "/gradio_api/file=https://example.org/x",
        "/gradio_api/proxy=https://example.org",
        "/assets/../../etc/passwd",
        "/gradio_api/upload",
        "/runs",
        "/gradio_api/runs",
        "/docs",
    ],
)
def test_the_guard_serves_nothing_else(path):
    assert ask(path) == 403 and ask(path, "POST") == 403


def test_a_link_out_of_the_pages_folder_is_not_followed(tmp_path):
    (tmp_path / "out").symlink_to("/etc/passwd")
    assert ask(f"/gradio_api/file={tmp_path}/out", folder=tmp_path) == 403


def test_the_guard_answers_no_other_site_and_no_other_name():
    join = "/gradio_api/queue/join"
    assert ask(join, "POST", origin="https://evil.example") == ask(join, "POST", origin="null") == 403
    assert ask(join, "POST", origin="http://127.0.0.1:8000") == 403
    assert ask("/", host="evil.example:7860") == ask("/", host="127.0.0.1:80") == 403
    assert ask(join, "POST", sec_fetch_site="cross-site") == ask("/", sec_fetch_site="same-site") == 403
    assert ask("/gradio_api/upload", "POST") == ask("/", "DELETE") == 403


def test_without_gradio_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['gradio'] = None\nfrom concept_ablation.__main__ import main\nsys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2 and "torch" not in done.stdout
    assert done.stderr.startswith("error: the page needs gradio") and "pip install '.[demo]'" in done.stderr
    assert done.stderr.count("\n") == 1
