"""A card's files: its folder with the delta, where a run's results have them, and strips of pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from concept_ablation.common.errors import UserError
from concept_ablation.common.image_store import METADATA_KEY, ImageStore, read_store
from concept_ablation.plan.stores import begins
from concept_ablation.report.figures import picture_strip

PAIRS = 6  # pairs of pictures in a strip
DELTA = "delta.safetensors"


class CardError(UserError):
    """A concept that isn't in the results, or a file of it that is missing; the message names it."""


def find_delta(results: Path, path: Path) -> Path:
    """The delta that the summary names: at its own path or, if the results were moved, below `results`."""
    for found in (path, results / Path(*path.parts[-3:]), results / Path(*path.parts[-2:])):
        if found.is_file():
            return found
    raise CardError(f"{path}: the delta isn't there, nor below {results}")


def find_base(results: Path, samples: ImageStore) -> dict[str, ImageStore]:
    """Subject -> the base model's pictures: of stores made with the same model and sampler, one that begins with the probe's."""
    made = {name: samples.metadata.get(name) for name in ("model", "sampler")}
    wanted = {
        probe["subject"]: {**made, "probe": {name: value for name, value in probe.items() if name != "role"}}
        for probe in samples.metadata["probes"]
    }
    found = {}
    for path in sorted((results / "base").glob("*.parquet")):
        metadata = json.loads((pq.read_schema(path).metadata or {}).get(METADATA_KEY, b"{}"))
        subject = metadata.get("probe", {}).get("subject")
        if subject in wanted.keys() - found.keys() and begins(
            {name: metadata.get(name) for name in wanted[subject]}, wanted[subject]
        ):
            found[subject] = read_store(path)
    if missing := [subject for subject in wanted if subject not in found]:
        raise CardError(
            f"{results / 'base'}: no pictures of {', '.join(missing)} by the base model; run the workflow again"
        )
    return found


def make_folder(out_folder: str | Path, delta_path: str | Path) -> Path:
    """A card's folder, new or of an earlier card, with the delta in it. Raises CardError if it holds other things."""
    out = Path(out_folder)
    if out.exists() and not (
        out.is_dir() and {p.name for p in out.iterdir()} <= {"README.md", "pictures", DELTA}
    ):
        raise CardError(f"{out}: holds other things; give a new folder")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for old in (out / "pictures").glob("*.png"):
        old.unlink()
    shutil.copyfile(delta_path, out / DELTA)
    return out


def save_strip(
    out: Path, number: int, probe: Mapping, samples: ImageStore, before: ImageStore
) -> dict | None:
    """Save a probe's first pictures, `before` above and those of `samples` below; None if there are none."""
    after = samples.select(probe["role"], probe["subject"])
    count = min(PAIRS, len(after), len(before))
    if not count:
        return None
    file = f"pictures/{number}-{probe['role']}.png"
    rows = [[store.image(position) for position in range(count)] for store in (before, after)]
    picture_strip(rows).save(out / file)
    return {"role": probe["role"].capitalize(), "subject": probe["subject"], "file": file}
