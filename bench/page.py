"""What a report costs a browser: when it paints, when it can be used, how much memory it takes, how it scrolls.

    python bench/report.py --rows 1000 --out page/  # a report of made-up rows
    python bench/page.py page/index.html            # docs/performance.md holds the table that it prints

Chromium is Debian's, or the one that CHROMIUM names (`make page-test` installs both it and Playwright). On a busy machine the
seconds grow; `CPU` counts the page's own process only.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

READY = """
window.ready = null;
const watch = setInterval(() => {
  if (document.getElementById("rows")) { window.ready = performance.now(); clearInterval(watch); }
}, 4);
"""
LOADED = """() => ({
  paint: performance.getEntriesByType("paint")[0]?.startTime,
  ready: window.ready,
  loaded: performance.getEntriesByType("navigation")[0].loadEventEnd,
  elements: document.querySelectorAll("*").length,
})"""
SCROLL = """() => new Promise((done) => {
  const steps = [];
  let last = performance.now();
  const end = last + 4000;
  function step(now) {
    steps.push(now - last);
    last = now;
    scrollBy(0, 60);
    if (now < end) requestAnimationFrame(step);
    else done(steps.slice(1).sort((a, b) => a - b)[steps.length >> 1]);
  }
  requestAnimationFrame(step);
})"""
ACTIONS = {
    "a search": "document.getElementById('find').value = '12'; document.getElementById('find').dispatchEvent(new Event('input'))",
    "a sort": "document.querySelector('#summary thead button').click()",
    "opening a row": "document.querySelector('#summary tbody tr:not([hidden]) a').click()",
}


def page_process() -> Path:
    """The process of the page: the renderer that worked most."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if "--type=renderer" in (folder / "cmdline").read_text():
                found.append((cpu_seconds(folder), folder))
        except OSError:  # it has ended
            continue
    return max(found)[1]


def cpu_seconds(process: Path) -> float:
    """User and system time of a process so far."""
    numbers = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(process: Path) -> float:
    """Its memory, with its part of what it shares."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="a report's index.html")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.add_init_script(READY)
        page.goto(options.page.resolve().as_uri())
        found, process = page.evaluate(LOADED), page_process()
        print("| what | is |\n|---|---|")
        for name in ("paint", "ready", "loaded"):
            print(f"| {name} | {found[name] / 1000:.2f} s |")
        print(f"| CPU until loaded | {cpu_seconds(process):.2f} s |")
        print(f"| elements | {found['elements']:,} |\n| memory | {memory_mb(process):.0f} MB |")
        print(f"| a frame while scrolling, median | {page.evaluate(SCROLL):.0f} ms |")
        for name, action in ACTIONS.items():
            script = f"() => {{ const start = performance.now(); {action}; document.body.offsetHeight; return performance.now() - start }}"
            print(f"| {name} | {page.evaluate(script):.0f} ms |")
        print(f"| memory after that | {memory_mb(process):.0f} MB |")
        browser.close()


if __name__ == "__main__":
    main()
