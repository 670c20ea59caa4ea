"""What the tables and the page cost for many finished rows, on made-up stores of the real form. No model is needed.

    python bench/report.py                          # 1,000 rows; docs/performance.md holds the table that it prints
    python bench/report.py --rows 1000 --out page/  # also keeps the tables and the page, to look at

The table and its plan are those of bench/plan.py; scores have every metric, probe and interval; samples and base stores have as
many pictures as the config draws, of --pixels a side. Each of the two stages runs in a process of its own, as under Snakemake.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from plan import ROOT, measure, read_plan, write_table

from concept_ablation.common.image_store import COLUMNS as IMAGES
from concept_ablation.common.image_store import FEATURES, METADATA_KEY, ROWS_A_GROUP
from concept_ablation.common.roles import probe_roles
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.evaluation.probes import score_probes
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.registries import KINDS

CLIP = 64  # numbers of a made-up CLIP feature
STAGES = {
    "tables": "from concept_ablation.report.tables import aggregate_scores as run; run(spec, scores, summary)",
    "page": "from concept_ablation.report.page import render as run; run(spec, scores, summary, page)",
}
CODE = """
import json
from pathlib import Path
spec = json.loads(Path("spec.json").read_text())
scores, summary, page = (f"results/report/{name}" for name in ("scores.parquet", "summary.parquet", "index.html"))
"""


def draw_pictures(count: int, seed: int, side: int) -> list[bytes]:
    """PNG files of made-up emoji: a few discs on white, of about the size of real ones."""
    random, files = np.random.default_rng(seed), []
    for _ in range(count):
        picture = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y, r = (int(v) for v in random.integers((8, 8, 4), (120, 120, 40)))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
        picture = picture.resize((side, side))
        noisy = np.asarray(picture) // 8 * 8 + random.integers(0, 8, (side, side, 1), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files


def write_images(path: Path, probes: list[dict], pictures: list[bytes], metadata: dict, shift: int) -> None:
    """An image store of the probes, each a mapping with role, subject, prompts, images and seed."""
    lines = [
        {
            "image": {"bytes": pictures[(shift + index) % len(pictures)], "path": f"{index:06d}.png"},
            "prompt": probe["prompts"][index % len(probe["prompts"])],
            "seed": probe["seed"] + index,
            "index": index,
            "role": probe.get("role"),
            "subject": probe["subject"],
        }
        for probe in probes
        for index in range(probe["images"])
    ]
    schema = IMAGES.with_metadata({METADATA_KEY: json.dumps(metadata), b"huggingface": FEATURES})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines, schema), path, compression="none", row_group_size=ROWS_A_GROUP)


def score_once(row: dict) -> list[dict]:
    """The long table of one row, of made-up features: every metric that the real stage writes."""
    random, probes = np.random.default_rng(0), []
    texts = {subject: random.normal(size=CLIP) for _, subject in probe_roles(row)}
    texts = {subject: text / np.linalg.norm(text) for subject, text in texts.items()}
    for role, subject in probe_roles(row):
        like = {"target": texts[row["anchor"]]}.get(role, texts[subject])
        sides = [text + 0.15 * random.normal(size=(16, CLIP)) for text in (texts[subject], like)]
        base, ablated = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        probes.append(Probe(role, subject, base, ablated, tuple(range(16)), {}))
    subjects = tuple(row["targets"]), row["anchor"], tuple(row["neighbors"])
    made = Row(KINDS[row["kind"]], *subjects, texts, probes)
    return score_probes(made, Bootstrap(0.95, 50, 0))


def make_stores(folder: Path, rows: int, side: int) -> dict:
    """A finished run of a made-up table of `rows` rows in `folder`; returns the report's spec."""
    for shared in ("config", "embedded"):
        (folder / shared).symlink_to(ROOT / shared)
    write_table(folder / "concepts.csv", rows)
    plan, pictures, template = read_plan(folder), draw_pictures(40, 0, side), None
    for key, spec in plan.specs["sample_base"].items():
        write_images(Path(plan.path(key)), [spec["probe"]], pictures, {"model": spec["model"]}, len(key))
    spec = json.loads(plan.report_spec())
    record = {"step": range(1, 121), "loss": np.linspace(0.3, 0.1, 120), "seconds": [0.5] * 120}
    record = pa.table({**record, "step": list(record["step"]), "peak_memory_bytes": [10**9] * 120})
    for number, (row, planned) in enumerate(zip(spec["rows"], plan.rows, strict=True)):
        sampled = plan.specs["sample_ablated"][planned.samples]
        metadata = {name: value for name, value in sampled.items() if name != "probes"}
        write_images(Path(row["samples"]), sampled["probes"], pictures, metadata, number)
        template = template or (row, score_once(row))
        names = dict(
            zip([s for _, s in probe_roles(template[0])], [s for _, s in probe_roles(row)], strict=True)
        )
        same = {name: row[name] for name in ("concept", "kind", "target", "anchor")}
        same |= {"features": "made up", "samples_key": planned.samples, "unit": ""}
        lines = [{**line, **same, "probe": names.get(line["probe"], line["probe"])} for line in template[1]]
        Path(row["scores"]).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(lines, schema=COLUMNS), row["scores"])
        Path(row["delta"]).parent.mkdir(parents=True, exist_ok=True)
        Path(row["delta"]).write_bytes(b"0" * 1000)
        pq.write_table(record, row["training"])
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1000], help="rows of the tables")
    parser.add_argument("--pixels", type=int, default=128, help="side of a picture (Stable Diffusion: 512)")
    parser.add_argument("--out", type=Path, help="a folder to keep the last report in")
    options = parser.parse_args()
    print("| rows | stage | seconds | CPU seconds | memory, MB | output, MB |\n|---|---|---|---|---|---|")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "spec.json").write_text(
                json.dumps(make_stores(folder, rows, options.pixels)), encoding="utf-8"
            )
            report = folder / "results" / "report"
            for stage, call in STAGES.items():
                before = size(report)
                wall, cpu, memory, _ = measure([sys.executable, "-c", CODE + call], folder)
                grown = (size(report) - before) / 1e6
                print(
                    f"| {rows:,} | {stage} | {wall:.1f} | {cpu:.1f} | {memory:,.0f} | {grown:.1f} |",
                    flush=True,
                )
            if options.out:
                shutil.copytree(report, options.out, dirs_exist_ok=True)


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.exists() else 0


if __name__ == "__main__":
    main()
