"""Make the README's picture and table from a finished run of the shipped rows: `python docs/before_after.py`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from concept_ablation.common.image_store import read_store
from concept_ablation.plan.graph import Plan, Row
from concept_ablation.plan.specs import load_plan

SHOWN = {
    "neon": "blueprint",
    "pouting cat": "weary cat",
    "owl": "penguin",
}  # target -> the neighbor beside it
IMAGES, SIDE, GAP, LABEL, TITLE = 5, 88, 4, 92, 26  # images a group; pixels
INK, GREY = (24, 26, 32), (110, 114, 124)


def shipped_plan() -> Plan:
    """The plan of the shipped table under the shipped config."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    return load_plan(config, ROOT / "workflow" / "schemas", "config.yaml")[1]


def strips(plan: Plan, row: Row, subject: str) -> list[list[Image.Image]]:
    """The first images of a probe: by the base model, by the ablated one."""
    base = read_store(plan.path(row.base[subject]))
    ablated = read_store(plan.path(row.samples)).select(subject=subject)
    step = max(1, len(base) // IMAGES)
    return [[store.image(i * step) for i in range(IMAGES)] for store in (base, ablated)]


def draw(plan: Plan) -> Image.Image:
    """The shown rows, one below the other: target left, neighbor right, before over after."""
    rows = {row.concept.target: row for row in plan.rows}
    group = IMAGES * (SIDE + GAP)
    height = TITLE + 2 * (SIDE + GAP) + 14
    page = Image.new("RGB", (LABEL + 2 * group + 24, height * len(SHOWN)), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    for place, (target, neighbor) in enumerate(SHOWN.items()):
        top = place * height
        for column, (subject, title) in enumerate(
            [(target, f"remove “{target}”"), (neighbor, f"keep “{neighbor}”")]
        ):
            left = LABEL + column * (group + 24)
            pen.text((left, top + 5), title, INK, bold)
            for line, images in enumerate(strips(plan, rows[target], subject)):
                y = top + TITLE + line * (SIDE + GAP)
                pen.text((8, y + SIDE // 2 - 8), ("before", "after")[line], GREY, plain)
                for i, image in enumerate(images):
                    page.paste(
                        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left + i * (SIDE + GAP), y)
                    )
    return page


def table(summary: Path) -> list[str]:
    """The README's table from `summary.csv`."""
    lines = [
        "| concept | becomes | target still detected: before → after | neighbors recognised: before → after (change, 95 % interval) | worst neighbor, typical: before → after | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in csv.DictReader(summary.open(encoding="utf-8")):
        pair = [f"{float(row[f'target_accuracy_{m}']):.0%}" for m in ("base", "ablated")]
        kept = [f"{float(row[f'neighbor_recognition_{m}']):.0%}" for m in ("base", "ablated")]
        change = [100 * float(row[f"neighbor_recognition_change{m}"]) for m in ("", "_low", "_high")]
        span = "{:+.0f} points, {:+.0f} to {:+.0f}".format(*change)
        worst = [f"{float(row[f'worst_neighbor_typical_{m}']):.0%}" for m in ("base", "ablated")]
        cells = [row["target"], row["anchor"], f"{pair[0]} → {pair[1]}", f"{kept[0]} → {kept[1]} ({span})"]
        cells += [f"{row['worst_neighbor']} {worst[0]} → {worst[1]}", f"{row['verdict']} ({row['firmness']})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    plan = shipped_plan()
    draw(plan).save(ROOT / "docs" / "before-after.png", optimize=True)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- table -->")
    after = rest.partition("<!-- /table -->")[2]
    lines = table(Path(plan.results) / "report" / "summary.csv")
    readme.write_text(f"{before}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- /table -->{after}")


if __name__ == "__main__":
    main()
