"""The page to try rows on, in a real browser and on the embedded model, as a reader uses it (`make demo-test`).

It needs gradio, which the extra `demo` brings, and the browser of `make page-test`. The table is made up, and its deltas are.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from concept_ablation.common.image_store import read_store
from concept_ablation.demo.catalogue import make_catalogue
from concept_ablation.diffusion.stages import sample_ablated
from tests.demo_results import ROOT, plan_of, write_deltas

pytestmark = pytest.mark.demo
HOSTILE = "<img src=x onerror=document.title=1> ${document.title=2} {{document}}"
TABLE = f"""concept,kind,target,anchor,neighbors,bundle
fox,object,fox,animal,dog,both
owl,object,owl,bird,duck,both
rage,inappropriate,angry face,face,cool face,
odd,style,"{HOSTILE}",picture,ink,
"""
OFFLINE = {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}  # a request to anywhere fails
WIDE, PHONE = 1440, 390


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The plan, its catalogue and the overlay of results with a delta for each row and the bundle."""
    plan, config, overlay = plan_of(tmp_path_factory.mktemp("demo"), TABLE)
    write_deltas(plan, [row.ablation for row in plan.rows] + [bundle.delta for bundle in plan.bundles])
    return plan, make_catalogue(plan, config["evaluation"]["sampler"]), overlay


@pytest.fixture(scope="module")
def address(made):
    """The page's address, of the command as a user gives it."""
    command = [sys.executable, "-m", "concept_ablation", "demo", "--port", "0", "--configfile", str(made[2])]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = server.stdout.readline()
    if not line.startswith("http://127.0.0.1:"):
        pytest.fail(
            f"the page didn't start (make demo-test installs what it needs): {server.communicate()[1]}"
        )
    yield line.split()[0]
    server.terminate()
    _, said = server.communicate(timeout=30)
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.fail(f"{error}: make demo-test installs what this test needs")
    if not program or not shutil.which(program):
        pytest.fail(
            f"no browser at {program or 'chromium'}: apt-get install chromium, or name one in CHROMIUM"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page in a window of its own; at the end nothing may have gone wrong in it or asked another host."""
    contexts, trouble = [], []

    def visit(width=WIDE, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:")) or trouble.append(request.url)
            ),
        )
        page.goto(address)
        settled(page, 2)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


def settled(page, count, history=None):
    """Waits until `count` pictures are there, the answer is whole, and the history has as many tiles."""
    page.wait_for_function(
        "count => document.querySelectorAll('#answer img').length === count"
        " && / pictures in /.test(document.querySelector('.ca-note').textContent)",
        arg=count,
    )
    if history:
        page.wait_for_function(
            "count => document.querySelectorAll('#history .thumbnail-item').length === count", arg=history
        )


def choose(page, name):
    """Adds a row or a bundle to those that are chosen."""
    box = page.get_by_label("Finished rows and bundles")
    box.fill(name)
    page.get_by_role("option", name=name).click()
    box.blur()


def ask(page, prompt, seed=None):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if seed is not None:
        page.get_by_label("Seed", exact=True).fill(str(seed))


def drawn(page):
    """Title and pixels of each picture that the page shows."""
    found = page.eval_on_selector_all(
        "#answer figure", "all => all.map(one => [one.textContent.trim(), one.querySelector('img').src])"
    )
    return [
        (title, np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))).astype(int))
        for title, src in found
    ]


def test_the_report_s_prompt_and_seed_give_its_picture(visit, made, tmp_path):
    plan, catalogue, _ = made
    row = next(row for row in plan.rows if row.concept.name == "fox")
    sample_ablated(
        plan.specs["sample_ablated"][row.samples],
        plan.path(row.ablation),
        tmp_path / "s",
        device="cpu",
        batch_size=16,
    )
    store = read_store(tmp_path / "s")
    page = visit()
    example = next(one for one in catalogue.choices["fox"].examples if one.role == "neighbor")
    page.get_by_label("Prompts and seeds of the report").click()
    page.get_by_role("option", name=example.label).click()
    page.wait_for_function(
        "text => document.querySelector('.ca-note').textContent.startsWith(text)", arg=example.prompt
    )
    settled(page, 2)
    place = next(
        place
        for place, one in enumerate(store.rows)
        if (one["prompt"], one["seed"]) == (example.prompt, example.seed)
    )
    (before, _), (title, picture) = drawn(page)
    assert (before, title) == ("base model", "without fox")
    assert (
        np.abs(picture - np.asarray(store.image(place)).astype(int)).max() <= 1
    )  # it was drawn in a batch of 16


def test_several_rows_strength_and_the_history(visit):
    page = visit()
    assert not page.get_by_text("Several at once").is_visible()
    choose(page, "owl → bird")
    choose(page, "bundle both")
    page.get_by_text("Several at once").wait_for()
    ask(page, "a fox and an owl", 7)
    page.get_by_role("button", name="Draw").click()
    settled(page, 5, history=2)
    titles = [title for title, _ in drawn(page)]
    assert titles[:4] == ["base model", "without fox", "without owl", "bundle both"]
    assert titles[4] == "fox + owl + bundle both, added up"
    first = drawn(page)

    page.get_by_label("number input for Strength").fill("0")
    page.get_by_role("button", name="Draw").click()
    settled(page, 5, history=3)
    assert "strength 0" in page.locator(".ca-note").inner_text()
    assert all(
        np.array_equal(picture, first[0][1]) for _, picture in drawn(page)
    )  # at 0 all are the base model

    page.locator("#history .thumbnail-item").nth(1).click()
    page.wait_for_function("document.querySelector('.ca-note').textContent.includes('strength 1 ')")
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(drawn(page), first, strict=True))
    assert page.get_by_label("number input for Strength").input_value() == "1"
    assert page.get_by_label("Prompt", exact=True).input_value() == "a fox and an owl"

    page.get_by_label("Each alone", exact=True).check()
    page.get_by_role("button", name="Another seed").click()
    settled(page, 4, history=4)
    assert "seed 7" not in page.locator(".ca-note").inner_text().partition(":")[0]


def test_unsafe_pictures_are_veiled_until_a_reader_asks(visit):
    page = visit()
    ask(page, "an angry face", 3)
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.locator(".ca-veiled").wait_for()
    settled(page, 2, history=None)
    blurred = "element => getComputedStyle(element).filter.includes('blur')"
    assert page.locator("#answer img").first.evaluate(blurred) and page.locator("#answer img").last.evaluate(
        blurred
    )
    tile = page.locator("#history .thumbnail-item img").first
    tile.wait_for()
    page.get_by_text("Show these pictures").click()
    assert not page.locator("#answer img").first.evaluate(blurred)
    # In the history it stays beyond recognition: neighbouring pixels hardly differ.
    source = tile.get_attribute("src")
    small = np.asarray(Image.open(io.BytesIO(urllib.request.urlopen(source).read())).convert("L")).astype(int)
    assert np.abs(np.diff(small[:, :120], axis=1)).max() < 16
    # Drawn again, it is veiled again.
    page.get_by_role("button", name="Another seed").click()
    page.wait_for_function("!document.querySelector('.ca-note').textContent.includes('seed 3 ')")
    assert page.locator("#answer img").first.evaluate(blurred)
    settled(page, 2)
    assert page.locator("#answer img").last.evaluate(blurred)


def test_values_of_the_table_and_prompts_are_text(visit):
    page = visit()
    choose(page, "<img src=x")
    ask(page, HOSTILE, 1)
    page.get_by_role("button", name="Draw").click()
    settled(page, 4, history=2)
    assert HOSTILE in page.locator(".ca-note").inner_text()
    assert drawn(page)[2][0] == f"without {HOSTILE}"
    assert HOSTILE in page.locator("#history").inner_text()
    assert page.title() == "Try it · concept ablation"
    assert page.locator("img[src='x']").count() == 0


def test_what_cant_be_drawn_is_told(visit):
    page = visit()
    ask(page, " ")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("the prompt is empty: say what to draw").wait_for()


@pytest.mark.parametrize("width,scheme", [(WIDE, "light"), (WIDE, "dark"), (800, "light"), (PHONE, "dark")])
def test_it_fits_the_window_and_can_be_read(visit, width, scheme):
    page = visit(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [one.bounding_box() for one in page.locator("#answer figure").all()]
    assert (
        boxes[0]["y"] == boxes[1]["y"] and boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"] / 2
    )  # side by side
    assert all(box["width"] >= 120 for box in boxes)


def test_it_serves_its_own_page_alone(address):
    def status(path, headers=(), data=None):
        request = urllib.request.Request(address + path, data=data, headers=dict(headers))
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    found, headers = status("/")
    assert found == 200 and "connect-src 'self'" in headers["content-security-policy"]
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={ROOT}/pyproject.toml",
        "/gradio_api/upload",
        "/docs",
    ):
        assert status(path)[0] == 403, path
    assert status("/", {"Host": "evil.example"})[0] == 403
    body = {"Content-Type": "application/json", "Origin": "https://evil.example"}
    assert status("/gradio_api/queue/join", body, b"{}")[0] == 403


def test_a_port_that_is_taken_is_told(address, made):
    command = [sys.executable, "-m", "concept_ablation", "demo", "--configfile", str(made[2])]
    done = subprocess.run(
        [*command, "--port", address.rpartition(":")[2]],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: port ") and "--port" in done.stderr
    assert done.stderr.count("\n") == 1
