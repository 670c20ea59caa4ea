"""The report's page in a real browser, as a reader uses it (`make page-test`): no model is needed, the rows are made up.

The browser is Debian's chromium, or the one that CHROMIUM names; Playwright drives it.
"""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_ablation.common.score_table import COLUMNS
from tests.test_report import make_page, make_row, write_interference, write_made_up_looks
from tests.test_triage import record_of

pytestmark = pytest.mark.browser
HEADS = [
    "Concept",
    "Verdict",
    "Target still there",
    "Neighbors recognised",
    "Worst neighbor",
    "Anchor typical",
]
HEADS += ["Training"]
SIZES = {1440: 1000, 1024: 800, 800: 1000, 390: 844}  # width -> height of the window, pixels
KEPT, PRESENT = "removed, neighbors kept", "not removed"


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    try:
        import axe_playwright_python  # noqa: F401
        import pypdf  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.fail(f"{error}: make page-test installs what this test needs")
    if not program or not shutil.which(program):
        pytest.fail(
            f"no browser at {program or 'chromium'}: apt-get install chromium, or name one in CHROMIUM"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """`few` has unfolded rows, one of them veiled; `many` has folded ones; in both every third row is not removed.

    `mixed` has a row that is harmed, one that is inconclusive, one of two targets, and a failure.
    """
    made = {}
    for name, count, kept in (("few", 4, 12), ("many", 21, 12)):
        folder, rows = tmp_path_factory.mktemp(name), []
        for number in range(count):
            kind = "nudity" if number == 1 else "object"
            row = make_row(
                folder,
                f"row {number:02}",
                kind=kind,
                neighbors=("owl", "goose" + "s" * 80 if number == 3 else "duck"),
            )
            set_score(row, "target", "ablated", 0.9 if number % 3 == 2 else 0.01 * (20 - number) / 2)
            losses = {f"victim {place}": -((place + number) % 5) / 4 for place in range(5)}
            write_interference(folder / f"{number}", row, {**losses, "owl": -0.1}, probed={"owl"})
            if number < 2:
                record_of(row)
            rows.append(row)
        make_page(folder, rows, images_per_probe=8, open_rows=kept)
        made[name] = (folder / "report" / "index.html").as_uri()
    made["mixed"] = make_mixed(tmp_path_factory.mktemp("mixed"))
    return made


def make_mixed(folder):
    kept, harmed, wide = (make_row(folder, name) for name in ("kept", "harmed", "wide"))
    several = make_row(folder, "several", target="pouting cat; weary cat")
    write_made_up_looks(kept)
    set_score(harmed, "neighbors", "difference", -0.3, ("recognition",))
    set_score(wide, "target", "ablated", 0.15, half_width=0.3)
    failure = {"stage": "score_concept", "how": "failed", "concepts": ["lost"]}
    failure |= {"lines": ["CRITICAL root: no images of 'owl'"], "log": "results/logs/score_concept/lost.log"}
    text = make_page(folder, [kept, harmed, wide, several], [failure], ["later"])
    assert 'class="chip warn"' in text and 'class="chip open"' in text and 'class="failures"' in text
    return (folder / "report" / "index.html").as_uri()


def set_score(row, role, side, value, metrics=("clip_accuracy", "detected"), half_width=0.004):
    """Gives the measure that decides, or another metric, another value."""
    lines = pq.read_table(row["scores"]).to_pylist()
    for line in lines:
        if (line["role"], line["side"]) == (role, side) and line["metric"] in metrics:
            line |= {"value": value, "ci_low": value - half_width, "ci_high": value + half_width}
    pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), row["scores"])


@pytest.fixture
def visit(browser):
    """Opens an address in a window of its own; at the end nothing may have gone wrong in it or asked another host."""
    contexts, trouble = [], []

    def visit(address, width=1440, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": SIZES.get(width, 900)}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:")) or trouble.append(request.url),
        )
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


LANDED = """(id) => {
    const top = document.getElementById(id + "-name").getBoundingClientRect().top;
    const end = scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
    return document.querySelector(`#${id} details`).open && top >= 0 && top < (end ? innerHeight - 40 : 60);
}"""


def assert_landed(page, row):
    """Row `row` gets unfolded, its heading comes to the window's top, or as near as the page's end allows, and stays there."""
    page.wait_for_function(LANDED, arg=row)
    page.wait_for_timeout(100)
    assert page.evaluate(LANDED, row)


def lines(page):
    """Concepts of the table's lines that are shown, in order."""
    return page.eval_on_selector_all(
        "#summary tbody tr:not([hidden])", "all => all.map((line) => line.querySelector('a').textContent)"
    )


def sections(page):
    return page.eval_on_selector_all(
        ".row:not([hidden])", "all => all.map((row) => row.querySelector('h2').textContent)"
    )


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", ["few", "many"])
def test_a_link_lands_on_its_row(visit, pages, name, width):
    page = visit(pages[name], width)
    for link in page.locator("#summary tbody a").all()[:: 1 if name == "few" else 6]:
        link.click()
        assert_landed(page, link.get_attribute("href").removeprefix("#"))
    page = visit(f"{pages[name]}#row-4", width)
    assert_landed(page, "row-4")


def test_going_back_lands_too_and_brings_back_what_is_filtered_out(visit, pages):
    page = visit(pages["many"])
    page.locator("#summary a", has_text="row 02").click()
    page.locator("#summary a", has_text="row 12").click()
    page.get_by_role("button", name=KEPT).click()
    page.go_back()
    assert_landed(page, "row-3")
    assert len(lines(page)) == 21


@pytest.mark.parametrize("width", [1440, 390])
def test_the_sections_are_sorted_with_the_table(visit, pages, width):
    page = visit(pages["many"], width)
    assert lines(page) == sections(page) and lines(page)[:7] == [f"row {n:02}" for n in range(2, 21, 3)]
    for head, first in (("Target still there", "row 19"), ("Target still there", "row 02")):
        page.get_by_role("button", name=head).click()
        assert lines(page) == sections(page) and lines(page)[0] == first
    page.get_by_role("button", name="Concept").click()
    assert lines(page) == sections(page) == sorted(lines(page))


def test_verdicts_are_filtered_by_buttons_and_the_text_seeks_names(visit, pages):
    page = visit(pages["many"])
    kept, present = (page.get_by_role("button", name=words) for words in (KEPT, PRESENT))
    assert kept.inner_text() == f"14 {KEPT}" and present.inner_text() == f"7 {PRESENT}"
    kept.click()
    assert len(lines(page)) == 14 and "row 02" not in lines(page) and lines(page) == sections(page)
    assert page.get_by_role("status").inner_text() == "14 of 21 concepts shown"
    present.click()
    assert len(lines(page)) == 21
    kept.click()
    assert lines(page) == sections(page) == [f"row {number:02}" for number in range(2, 21, 3)]
    present.click()
    page.get_by_role("searchbox").fill("Goose")  # a neighbor
    assert lines(page) == sections(page) == ["row 03"]
    page.get_by_role("searchbox").fill("removed")
    assert lines(page) == []


def test_what_is_shown_stands_in_the_address(visit, pages):
    page = visit(pages["many"])
    page.get_by_role("button", name="7 failed").click()
    assert len(lines(page)) == 7 and "row 02" in lines(page)
    page.get_by_role("searchbox").fill("row 1")
    page.get_by_role("button", name="Concept").click()
    page.get_by_role("button", name="Concept").click()
    assert lines(page) == ["row 17", "row 14", "row 11"]
    page.get_by_role("link", name="row 14").first.click()
    again = visit(page.url)
    assert lines(again) == sections(again) == ["row 17", "row 14", "row 11"]
    assert again.get_by_role("button", name="7 failed").get_attribute("aria-pressed") == "true"
    assert_landed(again, "row-15")


def test_a_point_of_the_overview_opens_its_row(visit, pages):
    page = visit(pages["many"])
    page.locator(".point[data-row='row-6'] circle").dispatch_event("click")
    assert_landed(page, "row-6")


def test_a_page_alone_enlarges_its_thumbnails(browser, pages, tmp_path):
    shutil.copy(pages["few"].removeprefix("file://"), tmp_path / "index.html")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.locator("#row-1 .probe.target figure img").first.click()
    page.wait_for_timeout(300)
    shown = (
        page.get_by_role("dialog")
        .locator(".stage img")
        .evaluate_all("all => all.map((one) => one.naturalWidth)")
    )
    page.close()
    assert shown == [192, 192]


def test_folded_rows_are_text_until_they_are_opened(visit, pages):
    page = visit(pages["many"])
    assert page.locator("#rows img").count() == 0 == page.locator("#rows .cards").count()
    page.locator("#row-2 summary").first.click()
    page.locator("#row-2 .cards").wait_for()
    assert page.locator("#rows .cards").count() == 1 and page.locator("#row-2 .strip img").count() > 40


def test_pictures_are_enlarged_sorted_by_what_counts_and_stay_veiled(visit, pages):
    page = visit(pages["few"])
    probe = page.locator("#row-1 .probe.target")
    probe.get_by_role("button", name="worst 8").click()
    seeds = probe.locator("figure:visible").evaluate_all(
        "all => all.sort((a, b) => getComputedStyle(a).order - getComputedStyle(b).order).map((one) => one.dataset.seed)"
    )
    assert seeds[:3] == ["109", "103", "111"] and len(seeds) == 8
    assert probe.locator(".of").inner_text() == "worst 8 of 12 seeds"
    probe.locator("figure[data-seed='109'] img").first.click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == "target pouting cat, seed 109: seen by CLIP"
    assert dialog.locator("tbody tr").first.inner_text().split() == ["clip", "accuracy", "yes", "yes"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "seed 111" in dialog.get_by_role("heading").inner_text()
    dialog.get_by_role("slider").fill("80")
    assert (
        dialog.locator(".over").evaluate("(one) => getComputedStyle(one).clipPath")
        == "inset(0px 0px 0px 80%)"
    )
    large = "(one) => one.complete && one.naturalWidth === 300 && one.src.endsWith('.webp')"
    for side in dialog.locator(".stage img").all():  # thumbnails have 192 pixels, the pictures 300
        page.wait_for_function(large, arg=side.element_handle())
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator("#row-2 .probe.target").get_by_role("button", name="Enlarge seed 101").click()
    blurred = "(one) => getComputedStyle(one).filter.includes('blur')"
    assert dialog.locator(".over").evaluate(blurred)
    dialog.get_by_label("Show this picture").check()
    assert not dialog.locator(".over").evaluate(blurred)


def test_the_keyboard_reaches_everything(visit, pages):
    page, reached = visit(pages["few"]), []
    for _ in range(800):
        page.keyboard.press("Tab")
        name = page.evaluate(
            """() => {
                const here = document.activeElement;
if (here === document.body) return "";
                const label = here.getAttribute("aria-label") ?? here.labels?.[0]?.textContent ?? here.textContent;
                return label.trim().split("\\n")[0];
            }"""
        )
        if not name:
            break
        reached.append(name)
        if name == "Anchor typical":
            page.keyboard.press("Enter")
            assert page.locator("th[aria-sort]").inner_text().startswith("Anchor typical")
        if name == "show the pictures of seed 100":
            first = page.locator(":focus ~ img").first
            assert "blur" in first.evaluate("(picture) => getComputedStyle(picture).filter")
            page.keyboard.press("Space")
            assert first.evaluate("(picture) => getComputedStyle(picture).filter") == "none"
            page.keyboard.press("Space")
    assert {*HEADS, "Unfold all", "Fold all", "Find a name, target, anchor, neighbor or kind"} <= set(reached)
    assert {f"3 {KEPT}", f"1 {PRESENT}", "row 00", "All scores of this row", "How to read this page"} <= set(
        reached
    )
    assert {"Show all pictures of this row", "show the pictures of seed 100"} <= set(reached)
    head = page.locator("#row-1 summary").first
    head.focus()
    page.keyboard.press("Enter")
    assert page.locator("#row-1 > details:not([open])").count() == 1


@pytest.mark.parametrize("width", [1440, 390])
def test_a_cell_of_who_harms_whom_leads_to_its_pictures(visit, pages, width):
    page = visit(pages["many"], width)
    for label, place in (("row 05 on victim 3:", "#row-6-victim-4"), ("row 05 on owl:", "#row-6-probe-3")):
        page.get_by_role("link", name=label).click()
        landed = "(place) => { const top = document.querySelector(place).getBoundingClientRect().top; return top >= 0 && top < innerHeight / 2 }"
        page.wait_for_function(landed, arg=place)
    assert page.locator(".fold[open]").count() == 1


def test_all_rows_unfold_and_fold_at_once(visit, pages):
    page = visit(pages["many"])
    assert page.locator(".fold[open]").count() == 0
    page.get_by_role("button", name=PRESENT).click()
    page.get_by_role("button", name="Unfold all").click()
    assert page.locator(".fold[open]").count() == 7  # what is filtered out stays as it is
    page.get_by_role("button", name="Fold all", exact=True).click()
    assert page.locator(".fold[open]").count() == 0


@pytest.mark.parametrize("name", ["few", "mixed"])
@pytest.mark.parametrize("width", [1440, 1281, 1280, 1200, 1024, 800, 390, 320])
def test_nothing_overlaps_or_leaves_the_window(visit, pages, width, name):
    page = visit(pages[name], width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = (
        "all => all.filter((part) => part.scrollWidth > part.clientWidth + 1).map((part) => part.outerHTML)"
    )
    assert page.eval_on_selector_all(".card, #summary th, #summary td", wide) == []
    outside = "(all) => all.some((part) => part.getBoundingClientRect().right > innerWidth)"
    assert not page.eval_on_selector_all("#summary td *, .card *", outside)


def test_paper_has_every_column_and_picture_in_light_colours(visit, pages, tmp_path):
    from pypdf import PdfReader

    page = visit(pages["few"], 390, "dark")
    page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    sheets = PdfReader(tmp_path / "page.pdf").pages
    head = " ".join(" ".join(sheet.extract_text().split()) for sheet in sheets[:2])
    assert all(name in head for name in HEADS) and "All rows at a glance" in head
    text = " ".join(" ".join(sheet.extract_text().split()) for sheet in sheets)
    assert all(f"row {number:02}" in text for number in range(4)) and "How to read this page" in text
    drawn = sum(sheet.get_contents().get_data().count(b" Do") for sheet in sheets)
    assert drawn >= page.locator("img").count() > 250
    page.set_viewport_size({"width": 970, "height": 700})
    page.emulate_media(media="print", color_scheme="dark")
    colours = "(body) => { const s = getComputedStyle(body); return [s.color, s.backgroundColor, s.printColorAdjust] }"
    assert page.locator("body").evaluate(colours) == ["rgb(26, 28, 32)", "rgb(255, 255, 255)", "exact"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 970
    cut = "(all) => all.some((part) => part.scrollWidth > part.clientWidth + 1)"
    assert not page.eval_on_selector_all(".strip, .board, .card, .scroll", cut)


def test_folded_rows_print_their_headings(visit, pages, tmp_path):
    from pypdf import PdfReader

    page = visit(pages["many"])
    page.locator("#summary a", has_text="row 05").click()
    page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    sheets = PdfReader(tmp_path / "page.pdf").pages
    text = " ".join(" ".join(sheet.extract_text().split()) for sheet in sheets)
    # in the table, in the map of harm and as a heading; row 05, which failed, also in the plot
    assert text.count("row 05") == 1 + text.count("row 06") == 4
    assert text.count("Training loss") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("name", ["few", "mixed"])
def test_accessibility(visit, pages, name, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(pages[name], width, scheme)
    page.eval_on_selector_all(".more", "(all) => all.forEach((part) => { part.open = true })")
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []
