"""A model card for a bundle: one model without the concepts of several rows; a folder as `card` writes it for one concept."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq

from concept_ablation.common.image_store import METADATA_KEY, ImageStore, read_store
from concept_ablation.registries import KINDS
from concept_ablation.report import card
from concept_ablation.report.bundles import bundle_text, general_text, read_bundles
from concept_ablation.report.card_files import find_base, find_delta, make_folder, save_strip
from concept_ablation.report.formatting import flat_settings, points, share

log = logging.getLogger(__name__)
STRIPS = 12
"""Rows whose target's pictures are shown, at most."""
UNLISTED = (*card.UNLISTED, "concepts", "bundle")


def card_of(results: str | Path, name: str, out_folder: str | Path, base_model: str | None = None) -> Path:
    """Write the card of a concept or, if no row is called so, of a bundle. Raises CardError, StoreError, DeltaError."""
    rows, bundles = Path(results) / "report" / "summary.parquet", _bundles(results)
    concepts = pq.read_table(rows, columns=["concept"])["concept"].to_pylist() if rows.is_file() else []
    write = card_of_bundle if name in bundles and name not in concepts else card.card_of_results
    return write(results, name, out_folder, base_model)


def _bundles(results: str | Path) -> dict[str, list[dict]]:
    """The lines of all judged bundles of a results folder, by name."""
    return read_bundles(Path(results) / "report" / "bundles.parquet")


def card_of_bundle(
    results: str | Path, name: str, out_folder: str | Path, base_model: str | None = None
) -> Path:
    """Write the card of a judged bundle; returns the folder. Raises CardError, StoreError, DeltaError."""
    from concept_ablation.diffusion.delta import load_delta

    results, lines = Path(results), _bundles(results)[name]
    delta = find_delta(results, Path(lines[0]["delta"]))
    tensors, metadata = load_delta(delta)
    out = make_folder(out_folder, delta)
    shown = {
        "front_matter": card.front_matter(metadata, base_model),
        "base": card.base_name(metadata, base_model),
        "name": name,
        "how": lines[0]["how"],
        "lines": [_cells(line) for line in lines],
        "outcome": bundle_text(lines),
        "general": general_text(lines[0]),
        "provisional": sum(line["firmness"] == "provisional" for line in lines),
        "hidden": any(not KINDS[line["kind"]].publishable for line in lines),
        "strips": list(_strips(out, results, Path(lines[0]["delta"]).parent.name)),
        "snippet": card.snippet(tensors, metadata, base_model),
        "settings": list(flat_settings(dict(sorted(metadata.items())), UNLISTED)),
    }
    text = card.environment().get_template("bundle_card.md.j2").render(shown)
    (out / "README.md").write_text(text, encoding="utf-8")
    log.info("%s: card of bundle %s", out, name)
    return out


def _cells(line: Mapping) -> dict[str, str]:
    """What a row's line of the table says."""
    firm = "" if line["firmness"] == "firm" else ", provisional"
    change = line["neighbor_recognition_change"]
    return {
        "target": line["target"],
        "anchor": line["anchor"],
        "verdict": f"{line['verdict']}{firm}",
        "left": f"{share(line['presence_base'])} -> {share(line['presence_ablated'])}",
        "neighbors": "-" if change is None else points(change),
    }


def _strips(out: Path, results: Path, key: str) -> Iterator[dict[str, str]]:
    """Save a strip of each row's first target, of the first rows: the base model's pictures above, the bundle's below."""
    for number, samples in enumerate(itertools.islice(_samples(results, key), STRIPS), 1):
        probe = samples.metadata["probes"][0]
        strip = save_strip(out, number, probe, samples, find_base(results, samples)[probe["subject"]])
        yield from [strip] if strip else []


def _samples(results: Path, key: str) -> Iterator[ImageStore]:
    """The pictures that the delta with this key drew of the rows' probes, where they may be published."""
    for path in sorted((results / "samples").glob("*.parquet")):
        metadata = json.loads((pq.read_schema(path).metadata or {}).get(METADATA_KEY, b"{}"))
        kind = path.name.partition("-")[0]  # a key begins with it
        rows = metadata.get("delta") == key and metadata["probes"][0]["role"] == "target"
        if rows and kind in KINDS and KINDS[kind].publishable:
            yield read_store(path)
