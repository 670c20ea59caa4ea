"""The report: one HTML page that opens offline, and the table a run ends with in the terminal.

The page is written as it is made, a row at a time, so that a thousand rows need no more memory than one. Jinja2 escapes
all text; styles and the one script are inside the file, and a content security policy forbids everything else.
"""

import base64
import hashlib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import jinja2
import markupsafe
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from concept_ablation import verdict
from concept_ablation.common.files import atomic_output
from concept_ablation.common.image_store import open_store
from concept_ablation.common.roles import POOLS, probe_roles
from concept_ablation.common.score_table import COLUMNS
from concept_ablation.common.text import size_text
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.report.bundles import bundle_text, general_text, nested_panels, read_bundles
from concept_ablation.report.changes import read_changes
from concept_ablation.report.figures import change_bar, curve_figure, sparkline, target_bar
from concept_ablation.report.formatting import format_metric, is_share, points, printable, share, whole_points
from concept_ablation.report.handover import card_command, handover, link_to, results_of
from concept_ablation.report.page_lines import harm, loss_limits, overview, rows_lines, worst_first
from concept_ablation.report.paper_figures import write_figures
from concept_ablation.report.sections import previews, sections
from concept_ablation.report.strength import curve, rung_text
from concept_ablation.report.tables import missing_rows, report_rows
from concept_ablation.report.triage import STATES, VERDICT_COLORS, count_states, rounded_up
from concept_ablation.report.victims import drawn_victims, harmed_first, interference_text, read_interference

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
TERMINAL_MARKS = {"good": "ok", "warn": "!!", "bad": "no"}
"""Colour of a verdict -> its mark in a terminal."""


def render(
    spec: Mapping,
    scores_path: str | Path,
    summary_path: str | Path,
    out_path: str | Path,
    when: datetime | None = None,
    bundles_path: str | Path | None = None,
    interference_path: str | Path | None = None,
) -> None:
    """Writes the page to `out_path`, whole or not at all, and beside it `figures`, the plots as files.

    Args:
        spec: as for `tables.aggregate_scores`, with "page": images_per_probe (pairs of pictures a probe), image_budget
            (pictures on the whole page, but a pair a row in any case), open_rows (up to so many rows are unfolded). Of a
            run that didn't finish also "failures" and "waiting".
        scores_path, summary_path: the tables that `aggregate_scores` wrote.
        when: the time in the page's head; None: now.
        bundles_path: the table that `bundles.aggregate_bundles` wrote, if there are bundles.
        interference_path: the table that `interference.aggregate_interference` wrote, if there is one.

    Raises:
        StoreError: a row's images can't be read.
    """
    shown = _shown(spec, scores_path, summary_path, when, read_interference(interference_path))
    bundles = read_bundles(bundles_path)
    panels, folder = nested_panels(bundles), Path(out_path).parent
    curves = curve_figure(panels) if panels else None
    figures = write_figures(folder / "figures", shown["lines"], shown["overview"], shown["matrix"], curves)
    more = {"bundles": bundles, "nested": curves, "handover": handover(folder, spec, figures)}
    stream = environment().get_template("report.html.j2").stream(shown | more)
    stream.enable_buffering(64)
    with atomic_output(out_path) as part:
        with part.open("w", encoding="utf-8") as file:
            stream.dump(file)
        log.info("%s: %d concepts, %s", out_path, len(spec["rows"]), size_text(part.stat().st_size))


def _shown(
    spec: Mapping,
    scores_path: str | Path,
    summary_path: str | Path,
    when: datetime | None,
    measured: Mapping[str, Sequence[Mapping]],
) -> dict:
    """What the template is filled with; the rows' pictures are read when it asks for them."""
    rows, page, limits = report_rows(spec), spec["page"], verdict.read_thresholds(spec)
    summary = {line["concept"]: line for line in pq.read_table(summary_path).to_pylist()}
    texts = [field.name for field in COLUMNS if field.type == pa.string()]
    scores = pq.read_table(scores_path, read_dictionary=texts)
    rows, lines = worst_first(rows, rows_lines(rows, summary, scores, limits))
    probes = sum(len(probe_roles(row)) for row in rows) + drawn_victims(measured)
    pairs = pairs_a_probe(probes, page["images_per_probe"], page["image_budget"])
    shown = probes_a_row(len(rows), probes, page["image_budget"])
    scored = set(pc.unique(scores["metric"]).to_pylist())
    return {
        **_code(),
        "when": when or datetime.now(UTC),
        "model": open_store(rows[0]["samples"]).metadata.get("model", {}) if rows else {},
        "scorers": [name for name in pc.unique(scores["features"]).to_pylist() if name],
        "lines": lines,
        "results": results_of(lines),
        "previews": previews(rows),
        **_counted(lines),
        "overview": overview(lines, limits.worst_neighbor_loss_max),
        "metrics_shown": [METRICS[name] for name in METRICS if name in scored],
        "limits": limits,
        "loss_limits": loss_limits(limits),
        "pairs": pairs,
        "capped": pairs < page["images_per_probe"],
        "probes_shown": shown,
        "failures": spec.get("failures", []),
        "waiting": spec.get("waiting", []),
        "changes": read_changes(page.get("earlier"), lines),
        "unfolded": len(rows) <= page["open_rows"],
        "sections": sections(rows, lines, scores, measured, pairs, shown),
        **harm(rows, lines, measured, scores, limits),
    }


def _counted(lines: Sequence[Mapping]) -> dict:
    """How many rows there are of each verdict and state, and which kinds."""
    kinds = sorted({line["kind"] for line in lines})
    return {"counts": count_verdicts(lines), "states": count_states(lines), "kinds_shown": kinds}


def _code() -> dict:
    """The page's style and script, and the script's hash, by which the content security policy allows it and no other."""
    style, script = ((TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": style, "script": script, "script_hash": digest}


def print_summary(
    summary_path: str | Path,
    report_path: str | Path,
    file: TextIO | None = None,
    most: int = 40,
    bundles_path: str | Path | None = None,
    interference_path: str | Path | None = None,
) -> None:
    """Prints how each row came out, one line a row (at most `most`), how each bundle did, and where the report is.

    To stderr if `file` is None.
    """
    table = pq.read_table(summary_path)
    lines, missing = table.to_pylist(), missing_rows(table)
    text = [summary_text(lines[:most])] if lines else []
    text += [f"... and {len(lines) - most} more in the report"] if len(lines) > most else []
    text += ["", f"{headline(lines)}."]
    measured = read_interference(interference_path)
    text += [f"Who harms whom: {interference_text(measured)}."] if measured else []
    for name, rows in read_bundles(bundles_path).items():
        text.append(f"Bundle {name}: {bundle_text(rows)}.")
        text += [f"  {found}." for found in [general_text(rows[0])] if found]
    text.append(f"Report: {report_path}")
    text += [f"Rows that are not in it, since they are not finished: {len(missing)}"] if missing else []
    print("\n".join(text), file=file or sys.stderr)


def headline(lines: Sequence[Mapping]) -> str:
    """How many concepts are gone, in one sentence without its full stop."""
    fine = sum(VERDICT_COLORS.get(line["verdict"]) == "good" for line in lines)
    noun = "concept" if len(lines) == 1 else "concepts"
    return f"{fine} of {len(lines)} {noun} removed with neighbors intact"


def summary_text(lines: Sequence[Mapping]) -> str:
    """The summary as aligned ASCII: verdict, target, neighbors and anchor before -> after, with 95 % intervals."""
    heads = (
        "target still there",
        "neighbors recognised, change in points",
        "worst neighbor",
        "anchor typical",
    )
    table = [("", "concept", "verdict", "", *heads)]
    for line in lines:
        table.append(
            (
                TERMINAL_MARKS.get(VERDICT_COLORS.get(line["verdict"]), "??"),
                printable(line["concept"], 28),
                line["verdict"],
                line["firmness"],
                f"{_change_text(line, 'presence')} {METRICS[line['measure']].label}",
                _change_text(line, "neighbor_recognition", difference=True),
                _worst_text(line),
                f"{share(line['anchor_typical_base'])} -> {share(line['anchor_typical_ablated'])}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def inert(markup: str) -> markupsafe.Markup:
    """Markup as the text of an element that the browser neither runs nor builds; the page's script makes elements of it.

    What is not ASCII is written as a reference: a browser holds such a text in a byte a letter, not in two.
    """
    text = re.sub(r"<(?=/?script|!--)", "&lt;", markup, flags=re.IGNORECASE)  # these alone could end it
    return markupsafe.Markup(text.encode("ascii", "xmlcharrefreplace").decode())


def pairs_a_probe(probes: int, wanted: int, budget: int) -> int:
    """How many pairs of pictures each probe shows: `wanted`, or fewer (at least 1) to keep the page within `budget`."""
    return max(1, min(wanted, budget // (2 * max(probes, 1))))


def probes_a_row(rows: int, probes: int, budget: int) -> int | None:
    """How many of a row's probes show pictures, at least 1; None, all of them, if a pair for each keeps within `budget`."""
    return None if 2 * probes <= budget else max(1, budget // (2 * rows))


def count_verdicts(lines: Sequence[Mapping]) -> dict[str, int]:
    """Rows by verdict, in the order of `verdict.VERDICTS`, without zeros."""
    found = [line["verdict"] for line in lines]
    return {
        words: found.count(words) for words in dict.fromkeys((*verdict.VERDICTS, *found)) if words in found
    }


def environment() -> jinja2.Environment:
    """Jinja2 with everything escaped, unknown names refused, and the page's number formats."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "share": share,
        "points": points,
        "whole_points": whole_points,
        "metric": format_metric,
        "sparkline": sparkline,
    }
    made.filters |= {"curve": curve, "rung": rung_text, "inert": inert}
    made.filters |= {
        "size": size_text,
        "target_bar": target_bar,
        "change_bar": change_bar,
        "is_share": is_share,
    }
    made.globals |= {"colors": VERDICT_COLORS, "headline": headline, "zip": zip, "state_texts": STATES}
    made.globals |= {"rounded_up": rounded_up, "card_command": card_command, "link_to": link_to}
    made.globals |= {"interference_text": interference_text, "harmed_first": harmed_first}
    made.globals |= {"bundle_text": bundle_text, "general_text": general_text}
    made.globals |= {"kinds": KINDS, "metrics": METRICS, "pools": tuple(POOLS.values())}
    return made


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


def _worst_text(line: Mapping) -> str:
    """ "duck, -12.5": the neighbor whose `typical` fell most, and by how many points; "-" for none."""
    if not line.get("worst_neighbor"):
        return "-"
    return f"{printable(line['worst_neighbor'], 20)}, {100 * line['worst_neighbor_typical_change']:+.1f}"
