"""Make the pictures of docs/faq.md from finished runs of the shipped rows and of docs/faq.csv: `python docs/faq_pictures.py`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from concept_ablation import apply_delta, load_pipeline
from concept_ablation.common.image_store import ImageStore, read_store
from concept_ablation.diffusion.delta_export import export_delta
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.plan.graph import Plan, Row
from concept_ablation.plan.specs import load_plan

SIDE, GAP, TITLE, BETWEEN = 72, 3, 24, 20  # pixels
INK, GREY = (24, 26, 32), (110, 114, 124)
Strip = list[Image.Image]


def plan_of(table: str) -> Plan:
    """The plan of a table of this checkout under the shipped config."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text()) | {"concepts": table}
    return load_plan(config, ROOT / "workflow" / "schemas", "config.yaml")[1]


def row_of(plan: Plan, concept: str) -> Row:
    return next(row for row in plan.rows if row.concept.name == concept)


def spread(store: ImageStore, count: int) -> Strip:
    """Pictures of a store, evenly spaced in it, so that they show several of its prompts."""
    step = max(1, len(store) // count)
    return [store.image(number * step) for number in range(count)]


def before(plan: Plan, row: Row, subject: str, count: int) -> Strip:
    return spread(read_store(plan.path(row.base[subject])), count)


def after(plan: Plan, row: Row, subject: str, count: int) -> Strip:
    return spread(read_store(plan.path(row.samples)).select(subject=subject), count)


def asked(plan: Plan, row: Row, family: str, side: str, count: int) -> Strip:
    """What a row's target looks like when it is asked for in other words."""
    return spread(read_store(plan.unit_files(row.attacks[0])["images"]).select(side, family), count)


def sheet(titles: Sequence[str], lines: Mapping[str, Sequence[Strip]]) -> Image.Image:
    """Groups of pictures side by side, each below its title; a line of all groups a label."""
    bold, plain = ImageFont.load_default(14), ImageFont.load_default(12)
    left = 12 + round(max(plain.getlength(label) for label in lines))
    groups = next(iter(lines.values()))
    starts = [left]
    for group in groups:
        starts.append(starts[-1] + len(group) * (SIDE + GAP) + BETWEEN)
    page = Image.new("RGB", (starts[-1] - BETWEEN, TITLE + len(lines) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for title, start in zip(titles, starts, strict=False):
        pen.text((start, 3), title, INK, bold)
    for number, (label, strips) in enumerate(lines.items()):
        y = TITLE + number * (SIDE + GAP)
        pen.text((4, y + SIDE // 2 - 7), label, GREY, plain)
        for start, strip in zip(starts, strips, strict=False):
            for place, picture in enumerate(strip):
                small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                page.paste(small, (start + place * (SIDE + GAP), y))
    return page


def worked(plan: Plan) -> Image.Image:
    """How do I see that it worked? A row's target, a neighbor and the anchor, before and after."""
    row = row_of(plan, "object-fox")
    subjects = {"fox": "target: a fox", "dog": "worst neighbor: a dog", "animal": "anchor: an animal"}
    sides = {"before": before, "after": after}
    return sheet(
        list(subjects.values()),
        {label: [side(plan, row, subject, 4) for subject in subjects] for label, side in sides.items()},
    )


def loaded(plan: Plan) -> Image.Image:
    """Which file do I load where? The same prompts and seeds by the delta and by what it was exported to."""
    row = row_of(plan, "object-fox")
    store, base = read_store(plan.path(row.base["fox"])), str(ROOT / "embedded/emoji-diffusion")
    prompts, seeds = ([one[name] for one in store.rows[::5]][:6] for name in ("prompt", "seed"))
    options = dict(plan.specs["sample_ablated"][row.samples]["sampler"])

    def drawn(path: str = base, change=lambda pipeline: None) -> Strip:
        pipeline = load_pipeline(path)
        change(pipeline)
        return list(sample_images(pipeline, prompts, seeds, sampler=options, batch_size=6, progress="draw"))

    with tempfile.TemporaryDirectory() as folder:
        delta, files = plan.path(row.ablation), {}
        for form in ("pipeline", "lora", "kohya"):
            files[form] = f"{folder}/fox-{form}" + (".safetensors" if form != "pipeline" else "")
            export_delta(delta, files[form], form)
        lines = {
            "before": drawn(),
            "delta": drawn(change=lambda pipeline: apply_delta(pipeline, delta)),
            "pipeline": drawn(files["pipeline"]),
            "lora": drawn(change=lambda pipeline: pipeline.load_lora_weights(files["lora"])),
            "kohya": drawn(change=lambda pipeline: pipeline.load_lora_weights(files["kohya"])),
        }
    return sheet(["fox"], {label: [strip] for label, strip in lines.items()})


def several(plan: Plan) -> Image.Image:
    """Several concepts at once? A picture of each target, before and by the one model without all of them."""
    bundle = plan.bundles[0]
    targets = [row.concept.target for row in bundle.judged]
    lines = {
        label: [[side(plan, row, row.concept.target, 1)[0] for row in bundle.judged]]
        for label, side in {"before": before, "one model": after}.items()
    }
    return sheet([", ".join(targets)], lines)


def negative(plan: Plan) -> Image.Image:
    """Is a negative prompt enough? The targets by the base model, with the target as negative prompt, and by the row's model."""
    names = ("fox", "owl")
    rows = {name: row_of(plan, f"object-{name}") for name in names}
    lines = {"before": [before(plan, rows[name], name, 6) for name in names]}
    lines["negative prompt"] = [after(plan, row_of(plan, f"{name}-negative-prompt"), name, 6) for name in names]  # fmt: skip
    lines["ablation"] = [after(plan, rows[name], name, 6) for name in names]
    return sheet([f"“{name}”" for name in names], lines)


def look_alike(plan: Plan) -> Image.Image:
    """Why did a look-alike vanish? A neighbor of the owl before, after a training that preserves nothing, and after the default."""
    rows = {"nothing preserved": row_of(plan, "owl-nothing-kept"), "default": row_of(plan, "object-owl")}
    subjects = ("owl", "penguin")
    lines = {"before": [before(plan, rows["default"], subject, 6) for subject in subjects]}
    lines |= {label: [after(plan, row, subject, 6) for subject in subjects] for label, row in rows.items()}
    return sheet(["target: an owl", "neighbor: a penguin"], lines)


def back(plan: Plan) -> Image.Image:
    """What if it comes back? A removed style asked for plainly, in other sentences and inside longer prompts."""
    row = row_of(plan, "style-pencil")
    families = {"paraphrase": "in other sentences", "longer": "inside longer prompts"}
    plain = {"before": before, "after": after}
    lines = {
        side: [draw(plan, row, "pencil", 4)]
        + [asked(plan, row, family, "base" if side == "before" else "ablated", 6) for family in families]
        for side, draw in plain.items()
    }
    return sheet(["in the style of pencil", *families.values()], lines)


PICTURES = {  # name -> what draws it, and from which table's plan
    "worked": (worked, "concepts.csv"),
    "loaded": (loaded, "concepts.csv"),
    "several": (several, "concepts.csv"),
    "back": (back, "concepts.csv"),
    "negative": (negative, "docs/faq.csv"),
    "look-alike": (look_alike, "docs/faq.csv"),
}


def main(names: Sequence[str]) -> None:
    """Draw the pictures of these names, or all."""
    for name in names or PICTURES:
        draw, table = PICTURES[name]
        draw(plan_of(table)).save(ROOT / "docs" / f"faq-{name}.webp", quality=88, method=6)


if __name__ == "__main__":
    main(sys.argv[1:])
