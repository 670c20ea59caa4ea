"""Bundles in the report: how each row came out under the model that lacks all concepts of its bundle, beside its own model.

`bundles.parquet` has a line a row of a bundle: the summary's columns, measured under the bundle's model, after `bundle`, `how`,
`verdict_alone` and `removed_alone`, what the row's own model comes to.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.files import damaged
from concept_ablation.report.discoveries import claim_columns, claim_p
from concept_ablation.report.summary import made_with, summarise, summary_schema
from concept_ablation.report.tables import TableError, read_scores, write_table
from concept_ablation.verdict import NOT_SHOWN, read_thresholds

log = logging.getLogger(__name__)
LEADING = {
    "bundle": pa.string(),
    "how": pa.string(),
    "verdict_alone": pa.string(),
    "removed_alone": pa.bool_(),
    "anchor_removed_by": pa.string(),
}
GENERAL = {
    "general_kid_x1000": ("kid_x1000", "ablated", True),
    "general_kid_x1000_floor": ("kid_x1000", "noise floor", True),
    "general_clip_score_2_5": ("clip_score_2_5", "ablated", False),
    "general_clip_score_2_5_base": ("clip_score_2_5", "base", False),
    "general_clip_score_2_5_change": ("clip_score_2_5", "difference", True),
}
"""A column of a bundle's general quality, the same in all its lines -> metric and side in its scores, and whether with the interval."""


def aggregate_bundles(spec: Mapping, summary_path: str | Path, out_path: str | Path) -> None:
    """Writes the table of all judged bundles to `out_path`, as Parquet and, beside it, as CSV.

    Args:
        spec: as for `tables.aggregate_scores`, with "bundles" (each: name, how, and rows as the spec's own).
        summary_path: the summary of the rows' own models.

    Raises:
        TableError: a row's scores are missing or damaged.
    """
    thresholds = read_thresholds(spec)
    alone = {line["concept"]: line for line in pq.read_table(summary_path).to_pylist()}
    lines = []
    for bundle in spec["bundles"]:
        named = {"bundle": bundle["name"], "how": bundle["how"]}
        members, claims = [], []
        general, gone = general_columns(bundle.get("general")), bundle.get("anchors_gone", {})
        for row in bundle["rows"]:
            own = alone.get(row["concept"], {})
            known = {f"{name}_alone": own.get(name) for name in ("verdict", "removed")}
            by = gone.get(row["concept"])
            scores = read_scores(row["scores"])
            found = summarise(row, scores, thresholds, judges_anchor=by is None)
            claims.append(claim_p(row, scores.to_pylist(), found["verdict"], thresholds, by is None))
            members.append(named | known | {"anchor_removed_by": by} | found | general | made_with(spec))
        lines += [line | more for line, more in zip(members, claim_columns(claims), strict=True)]
    columns = bundles_schema()
    write_table([pa.Table.from_pylist(lines, schema=columns)], out_path, columns)
    log.info("%d bundles, %d rows", len(spec["bundles"]), len(lines))


def general_columns(path: str | Path | None) -> dict[str, float | None]:
    """The columns of a bundle's general quality, from its scores; None in all without them. Raises TableError."""
    if path is None:
        return {name: None for name, _ in general_schema()}
    try:
        lines = {(line["metric"], line["side"]): line for line in pq.read_table(path).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        raise damaged(TableError, path, f"scores can't be read ({error})") from error
    found = {}
    for name, (metric, side, interval) in GENERAL.items():
        line = lines[metric, side]
        found[name] = line["value"]
        if interval:
            found |= {f"{name}_low": line["ci_low"], f"{name}_high": line["ci_high"]}
    return found | {"general_images": lines["kid_x1000", "ablated"]["n"]}


def bundles_schema() -> pa.Schema:
    """The columns of the table of bundles, in order."""
    return pa.schema([*LEADING.items(), *summary_schema(), *general_schema()])


def general_schema() -> list[tuple[str, pa.DataType]]:
    """The columns of general quality, in order."""
    names = [
        name + end for name, (*_, own) in GENERAL.items() for end in (("", "_low", "_high") if own else ("",))
    ]
    return [*((name, pa.float64()) for name in names), ("general_images", pa.int64())]


def read_bundles(path: str | Path | None) -> dict[str, list[dict]]:
    """The lines of the table by bundle; none without a table."""
    found: dict[str, list[dict]] = {}
    for line in pq.read_table(path).to_pylist() if path and Path(path).is_file() else ():
        found.setdefault(line["bundle"], []).append(line)
    return found


def bundle_text(lines: Sequence[Mapping]) -> str:
    """How a bundle came out, without a full stop: `38 of 40 removed; came back: fox, owl; neighbors lost: pizza (bread)`, or
    `40 of 40 removed; all neighbors and anchors kept`."""
    present = [line for line in lines if not line["removed"]]
    back = [line["concept"] for line in present if line["removed_alone"]]
    never = [line["concept"] for line in present if not line["removed_alone"]]
    hidden = [line["concept"] for line in lines if line["verdict"] == NOT_SHOWN]
    lost = [f"{line['concept']} ({line['worst_neighbor']})" for line in lines if line["kept"] is False]
    anchors = [f"{line['concept']} ({line['anchor']})" for line in lines if line["anchor_kept"] is False]
    gone = [f"{line['concept']} ({line['anchor']})" for line in lines if line.get("anchor_removed_by")]
    text = f"{sum(line['removed'] for line in lines)} of {len(lines)} removed"
    for title, names in (
        ("came back", back),
        ("not removed alone either", never),
        ("rarely drawn by the base model", hidden),
        ("neighbors lost", lost),
        ("anchor lost", anchors),
        ("anchor removed by another row", gone),
    ):
        text += f"; {title}: {', '.join(names)}" if names else ""
    kept = all(
        line["kept"] and (line["anchor_kept"] or line.get("anchor_removed_by") is not None) for line in lines
    )
    return f"{text}; all neighbors and anchors kept" if kept else text


def general_text(line: Mapping) -> str:
    """A bundle's general quality, without a full stop; nothing where it wasn't measured."""
    if line.get("general_images") is None:
        return ""

    def number(name: str) -> str:
        value, low, high = (line[f"general_{name}{end}"] for end in ("", "_low", "_high"))
        return f"{value:z.1f} [{low:z.1f}, {high:z.1f}]"

    base, after = (line[f"general_clip_score_2_5{end}"] for end in ("_base", ""))
    return (
        f"{line['general_images']} pictures of neutral prompts: KID x 1000 {number('kid_x1000')} to the base model, whose own other "
        f"seeds lie at {number('kid_x1000_floor')}; CLIPScore {after:.3f} (base model {base:.3f})"
    )


def nested_panels(bundles: Mapping[str, Sequence[Mapping]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What `figures.curve_figure` draws of bundles of which one's rows contain another's, a line a way; nothing without such.

    A panel holds shares: of rows that are removed, and of those whose neighbors are kept.
    """
    chains: dict[str, list[list[Mapping]]] = {}
    for lines in sorted(bundles.values(), key=len):
        chain = chains.setdefault(lines[0]["how"], [])
        names = {line["concept"] for line in lines}
        if not chain or {line["concept"] for line in chain[-1]} < names:
            chain.append(list(lines))
    nested = {how: chain for how, chain in chains.items() if len(chain) > 1}
    panels = {"targets removed": "removed", "neighbors kept": "kept"} if nested else {}
    return {
        title: {
            how: [point for lines in chain for point in _share(lines, column)]
            for how, chain in nested.items()
        }
        for title, column in panels.items()
    }


def _share(lines: Sequence[Mapping], column: str) -> list[tuple[int, float]]:
    """The number of a bundle's rows, and the share of those with a value for which it is true; nothing without such."""
    found = [bool(line[column]) for line in lines if line[column] is not None]
    return [(len(lines), sum(found) / len(found))] if found else []
