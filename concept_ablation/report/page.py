"""The report: one HTML page that opens offline, and the table a run ends with in the terminal.

The page is written as it is made, a row at a time, so that a thousand rows need no more memory than one. Jinja2 escapes
all text; styles and the one script are inside the file, and a content security policy forbids everything else.
"""

import base64
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

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
from concept_ablation.report.comebacks import read_attacks
from concept_ablation.report.console import count_verdicts, headline
from concept_ablation.report.costs import read_costs_table, stage_costs, total
from concept_ablation.report.figures import change_bar, curve_figure, sparkline, target_bar
from concept_ablation.report.formatting import (
    duration,
    format_metric,
    is_share,
    points,
    share,
    whole_points,
)
from concept_ablation.report.full_size import FOLDER, FullSize, full_size_of
from concept_ablation.report.handover import card_command, handover, link_to, results_of
from concept_ablation.report.methods_figure import shown_methods
from concept_ablation.report.page_lines import harm, loss_limits, overview, rows_lines, worst_first
from concept_ablation.report.paper_figures import write_figures
from concept_ablation.report.sections import previews, sections
from concept_ablation.report.strength import curve, rung_text
from concept_ablation.report.tables import report_rows
from concept_ablation.report.triage import STATES, VERDICT_COLORS, count_states, rounded_up
from concept_ablation.report.victims import drawn_victims, harmed_first, interference_text, read_interference

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"


def render(
    spec: Mapping,
    scores_path: str | Path,
    summary_path: str | Path,
    out_path: str | Path,
    when: datetime | None = None,
    bundles_path: str | Path | None = None,
    interference_path: str | Path | None = None,
    costs_path: str | Path | None = None,
    attacks_path: str | Path | None = None,
) -> None:
    """Writes the page to `out_path`, whole or not at all, and beside it `figures`, the plots and the enlarged pictures as files.

    Args:
        spec: as for `tables.aggregate_scores`, with "page": images_per_probe (pairs of pictures a probe), image_budget
            (pictures on the whole page, but a pair a row in any case), open_rows (up to so many rows are unfolded). Of a
            run that didn't finish also "failures" and "waiting".
        scores_path, summary_path: the tables that `aggregate_scores` wrote.
        when: the time in the page's head; None: now.
        bundles_path: the table that `bundles.aggregate_bundles` wrote, if there are bundles.
        interference_path: the table that `interference.aggregate_interference` wrote, if there is one.
        costs_path: the table that `costs.aggregate_costs` wrote, if there is one.
        attacks_path: the table that `attacks.aggregate_attacks` wrote, if there is one.

    Raises:
        StoreError: a row's images can't be read.
    """
    measured = read_interference(interference_path), read_attacks(attacks_path)
    folder = Path(out_path).parent
    full = full_size_of(report_rows(spec), folder)
    shown = _shown(spec, scores_path, summary_path, when, *measured, full)
    bundles = read_bundles(bundles_path)
    costs = read_costs_table(costs_path)
    shown |= {"stage_costs": stage_costs(costs), "total_cost": total(costs)}
    panels = nested_panels(bundles)
    curves = curve_figure(panels) if panels else None
    figures = write_figures(folder / "figures", shown["lines"], shown["overview"], shown["matrix"], curves)
    more = {"bundles": bundles, "nested": curves, "handover": handover(folder, spec, figures)}
    more["full_size"] = FOLDER if full else ""
    stream = environment().get_template("report.html.j2").stream(shown | more)
    stream.enable_buffering(8)  # a folded row is one piece
    with atomic_output(out_path) as part:
        with part.open("w", encoding="utf-8") as file:
            stream.dump(file)
        if full:
            full.remove_others()
        log.info("%s: %d concepts, %s", out_path, len(spec["rows"]), size_text(part.stat().st_size))


def _shown(
    spec: Mapping,
    scores_path: str | Path,
    summary_path: str | Path,
    when: datetime | None,
    measured: Mapping[str, Sequence[Mapping]],
    tried: Mapping[str, Sequence[Mapping]],
    full: FullSize | None,
) -> dict:
    """What the template is filled with; the rows' pictures are read when it asks for them."""
    rows, page, limits = report_rows(spec), spec["page"], verdict.read_thresholds(spec)
    summary = {line["concept"]: line for line in pq.read_table(summary_path).to_pylist()}
    texts = [field.name for field in COLUMNS if field.type == pa.string()]
    scores = pq.read_table(scores_path, read_dictionary=texts)
    rows, lines = worst_first(rows, rows_lines(rows, summary, scores, limits))
    probes = sum(len(probe_roles(row)) for row in rows) + drawn_victims(measured) + len(tried)
    pairs = pairs_a_probe(probes, page["images_per_probe"], page["image_budget"])
    shown = probes_a_row(len(rows), probes, page["image_budget"])
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
        "metrics_shown": _metrics(scores),
        "limits": limits,
        "loss_limits": loss_limits(limits),
        "pairs": pairs,
        "capped": pairs < page["images_per_probe"],
        "probes_shown": shown,
        **{name: spec.get(name, []) for name in ("failures", "waiting")},
        "changes": read_changes(page.get("earlier"), lines),
        "unfolded": len(rows) <= page["open_rows"],
        "sections": sections(rows, lines, scores, measured, pairs, shown, tried, full),
        **harm(rows, lines, measured, scores, limits),
        **shown_methods(rows, lines),
    }


def _metrics(scores: pa.Table) -> list:
    """The metrics that a table of scores has, in the order of their registry."""
    scored = set(pc.unique(scores["metric"]).to_pylist())
    return [METRICS[name] for name in METRICS if name in scored]


def _counted(lines: Sequence[Mapping]) -> dict:
    """How many rows there are of each verdict and state, and which kinds."""
    kinds = sorted({line["kind"] for line in lines})
    return {"counts": count_verdicts(lines), "states": count_states(lines), "kinds_shown": kinds}


def _code() -> dict:
    """The page's style and script, and the script's hash, by which the content security policy allows it and no other."""
    style, script = ((TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": style, "script": script, "script_hash": digest}


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
    made.filters |= {"duration": duration}
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
