"""The report: one HTML page that opens offline, and the table a run ends with in the terminal.

The page is written as it is made, a row at a time, so that a thousand rows need no more memory than one. Jinja2 escapes
all text; styles and the one script are inside the file, and a content security policy forbids everything else.
"""

import base64
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from concept_ablation import verdict
from concept_ablation.columns import COLUMNS, POOLS, SHARES, probe_roles
from concept_ablation.figures import format_metric, points, share, sparkline, thumbnail
from concept_ablation.imagestore import ImageStore, open_picture, open_store
from concept_ablation.prompts import UNSAFE
from concept_ablation.runtime import atomic_output
from concept_ablation.summary import training_record
from concept_ablation.tables import report_rows

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
TONES = {
    verdict.KEPT: "good",
    verdict.ALONE: "good",
    verdict.HARMED: "warn",
    verdict.ANCHOR_HARMED: "warn",
    verdict.PRESENT: "bad",
}
"""Colour of a verdict; the inconclusive ones are neutral."""

MARKS = {"good": "ok", "warn": "!!", "bad": "no"}
"""The same in a terminal."""

SEEN = {"clip_accuracy": "seen by CLIP", "copy_rate": "copied", "detected": "flagged"}
"""The measure that decides for a kind, in a word or three."""

PAGE = {"images_per_probe": 8, "image_budget": 6000, "open_rows": 12}
"""Pairs of pictures a probe; pictures on the whole page (but a pair a row in any case); up to so many rows are unfolded."""


def render(
    spec: Mapping | Sequence[Mapping],
    scores_path: str | Path,
    summary_path: str | Path,
    out_path: str | Path,
    when: datetime | None = None,
) -> None:
    """Writes the page to `out_path`, whole or not at all.

    Args:
        spec: as for `tables.aggregate_scores`; a mapping may also hold "page", other values for some of `PAGE`.
        scores_path, summary_path: the tables that `aggregate_scores` wrote.
        when: the time in the page's head; None: now.

    Raises:
        StoreError: a row's images can't be read.
    """
    rows, page = (
        report_rows(spec),
        PAGE | dict(spec.get("page", {}) if isinstance(spec, Mapping) else {}),
    )
    summary = {line["concept"]: line for line in pq.read_table(summary_path).to_pylist()}
    lines = [summary[row["concept"]] | {"id": f"row-{number}"} for number, row in enumerate(rows, 1)]
    probes = sum(len(probe_roles(row)) for row in rows)
    pairs = pairs_a_probe(probes, page["images_per_probe"], page["image_budget"])
    shown = probes_a_row(len(rows), probes, page["image_budget"])
    texts = [field.name for field in COLUMNS if field.type == pa.string()]
    scores = pq.read_table(scores_path, read_dictionary=texts)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    stream = (
        environment()
        .get_template("report.html.j2")
        .stream(
            style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            when=when or datetime.now(UTC),
            model=open_store(rows[0]["samples"]).metadata.get("model", {}) if rows else {},
            scorers=pc.unique(scores["features"]).to_pylist(),
            lines=lines,
            previews=_previews(rows),
            counts=count_verdicts(lines),
            kinds=sorted({line["kind"] for line in lines}),
            limits=verdict.read_thresholds(spec),
            pairs=pairs,
            capped=pairs < page["images_per_probe"],
            probes_shown=shown,
            failures=spec.get("failures", []) if isinstance(spec, Mapping) else [],
            waiting=spec.get("waiting", []) if isinstance(spec, Mapping) else [],
            unfolded=len(rows) <= page["open_rows"],
            sections=_sections(rows, lines, scores, pairs, shown),
        )
    )
    stream.enable_buffering(64)
    with atomic_output(out_path) as part:
        with part.open("w", encoding="utf-8") as file:
            stream.dump(file)
        log.info("%s: %d concepts, %.1f MB", out_path, len(rows), part.stat().st_size / 1e6)


def print_summary(
    summary_path: str | Path, report_path: str | Path, file: TextIO | None = None, most: int = 40
) -> None:
    """Prints how each row came out, one line a row (at most `most`), and where the report is; to stderr if `file` is None."""
    lines = pq.read_table(summary_path).to_pylist()
    text = [summary_text(lines[:most])] if lines else []
    text += [f"... and {len(lines) - most} more in the report"] if len(lines) > most else []
    text += ["", f"{headline(lines)}.", f"Report: {report_path}"]
    print("\n".join(text), file=file or sys.stderr)


def headline(lines: Sequence[Mapping]) -> str:
    """How many concepts are gone, in one sentence without its full stop."""
    fine = sum(TONES.get(line["verdict"]) == "good" for line in lines)
    noun = "concept" if len(lines) == 1 else "concepts"
    return f"{fine} of {len(lines)} {noun} removed with neighbors intact"


def summary_text(lines: Sequence[Mapping]) -> str:
    """The summary as aligned ASCII: verdict, target, neighbors and anchor before -> after, with 95 % intervals."""
    heads = ("target still there", "neighbors recognised, change in points", "anchor typical")
    table = [("", "concept", "verdict", *heads)]
    for line in lines:
        table.append(
            (
                MARKS.get(TONES.get(line["verdict"]), "??"),
                _printable(line["concept"], 28),
                line["verdict"],
                f"{_change_text(line, 'presence')} {SEEN[line['measure']]}",
                _change_text(line, "neighbor_recognition", difference=True),
                f"{share(line['anchor_typical_base'])} -> {share(line['anchor_typical_ablated'])}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def pairs_a_probe(probes: int, wanted: int, budget: int) -> int:
    """How many pairs of pictures each probe shows: `wanted`, or fewer (at least 1) to keep the page within `budget`."""
    return max(1, min(wanted, budget // (2 * max(probes, 1))))


def probes_a_row(rows: int, probes: int, budget: int) -> int | None:
    """How many of a row's probes show pictures, at least 1; None, all of them, if a pair for each keeps within `budget`."""
    return None if 2 * probes <= budget else max(1, budget // (2 * rows))


def count_verdicts(lines: Sequence[Mapping]) -> dict[str, int]:
    """Rows by verdict, in the order of `verdict.VERDICTS`, without zeros."""
    found = [line["verdict"] for line in lines]
    return {words: found.count(words) for words in verdict.VERDICTS if words in found}


def environment() -> jinja2.Environment:
    """Jinja2 with everything escaped, unknown names refused, and the page's number formats."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"share": share, "points": points, "metric": format_metric, "sparkline": sparkline}
    made.globals |= {"tones": TONES, "headline": headline, "zip": zip, "shares": SHARES, "seen": SEEN}
    made.globals |= {"unsafe": UNSAFE, "measures": verdict.MEASURES, "pools": tuple(POOLS.values())}
    return made


def _previews(rows: Sequence[Mapping]) -> Iterator[tuple[str, str] | None]:
    """The target's first picture before and after, small, for each line of the page's table."""
    for row in rows:
        after = open_store(row["samples"]).select("target", row["targets"][0])
        before = open_store(row["base"][row["targets"][0]])
        yield (
            tuple(thumbnail(store.image(0), 88) for store in (before, after))
            if len(after) and len(before)
            else None
        )


def _sections(
    rows: Sequence[Mapping], lines: Sequence[Mapping], scores: pa.Table, pairs: int, shown: int | None
) -> Iterator[dict]:
    """What the page shows of each row, made when the page asks for it. `shown`: as `probes_a_row` gives it."""
    places = _places(scores["concept"])
    for row, line in zip(rows, lines, strict=True):
        samples = open_store(row["samples"])
        metrics = _metric_lines(scores.take(places.get(row["concept"], [])).to_pylist())
        record, chosen = training_record(row), _most_telling(row, metrics)[:shown]
        yield line | {
            "row": row,
            "probes": [
                _probe(row, samples, *place, metrics, pairs if place in chosen else 0)
                for place in probe_roles(row)
            ],
            "memorized": _memorized(row),
            "metrics": metrics,
            "loss": record.get("loss", []),
            "settings": _settings(samples.metadata),
        }


def _places(names: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Each name's places in a column."""
    codes = np.unique(names.to_numpy(), return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
    return {names[int(group[0])].as_py(): group for group in groups}


def _most_telling(row: Mapping, metrics: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Role and subject of a row's probes: targets, the anchor, then the neighbors, those that lost most first."""
    lost = {
        line["probe"]: line["difference"]["value"]
        for line in metrics
        if line["role"] == "neighbor" and line["metric"] == "recognition" and "difference" in line
    }
    return sorted(probe_roles(row), key=lambda place: lost.get(place[1], 0) if place[0] == "neighbor" else -2)


def _memorized(row: Mapping) -> str | None:
    """The memorized picture, small; None for other kinds, and where its file is gone."""
    if not row.get("image"):
        return None
    try:
        return thumbnail(open_picture(row["image"]))
    except OSError as error:
        log.warning("%s: the memorized picture can't be shown: %s", row["concept"], error)
        return None


def _probe(
    row: Mapping, samples: ImageStore, role: str, subject: str, metrics: Sequence[Mapping], pairs: int
) -> dict:
    ablated = samples.select(role, subject)
    shown = min(pairs, len(ablated))
    before = _base_pictures(str(row["base"][subject]), shown)
    after = [thumbnail(ablated.image(position)) for position in range(shown)]
    pictures = [
        {"prompt": prompt, "seed": seed, "base": base, "ablated": picture}
        for (prompt, seed, base), picture in zip(before, after, strict=True)
    ]
    found = {line["metric"]: line for line in metrics if (line["role"], line["probe"]) == (role, subject)}
    return {"role": role, "subject": subject, "total": len(ablated), "pictures": pictures, "metrics": found}


@lru_cache(maxsize=1024)
def _base_pictures(path: str, count: int) -> list[tuple[str, int, str]]:
    """Prompt, seed and picture of a base store's first images; rows share these stores."""
    store = open_store(path)
    return [(store.rows[i]["prompt"], store.rows[i]["seed"], thumbnail(store.image(i))) for i in range(count)]


def _metric_lines(scores: Sequence[Mapping]) -> list[dict]:
    """One line a probe and metric, with its values by model: the long table, a little wider."""
    lines: dict[tuple, dict] = {}
    for score in scores:
        place = {name: score[name] for name in ("role", "probe", "metric", "text", "against", "unit", "n")}
        lines.setdefault(tuple(place.values())[:3], place)[score["model"]] = score
    return list(lines.values())


def _settings(metadata: Mapping) -> list[tuple[str, str]]:
    """What a row was made with, as names and values: flat, without the prompts."""
    flat: list[tuple[str, str]] = []

    def visit(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key in value:
                visit(f"{name}.{key}" if name else str(key), value[key])
        elif name not in ("probes", "stage"):
            flat.append((name, value if isinstance(value, str) else json.dumps(value)))

    visit("", metadata)
    return flat


def _change_text(line: Mapping, column: str, difference: bool = False) -> str:
    """ "97% -> 3% [0%, 13%]", or with the paired difference and its interval; "-" where nothing was measured."""
    if line[f"{column}_base"] is None:
        return "-"
    text = f"{share(line[f'{column}_base'])} -> {share(line[f'{column}_ablated'])}"
    name = f"{column}_change" if difference else f"{column}_ablated"
    value, low, high = (line[name + end] for end in ("", "_low", "_high"))
    if difference:
        return f"{text}, {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{text} [{share(low)}, {share(high)}]"


def _printable(text: str, width: int) -> str:
    """A name for the terminal: no control characters, no longer than `width`."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= width else clean[: width - 3] + "..."
