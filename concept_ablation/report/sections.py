"""What the page shows of each row: its pictures, its scores, its settings. Rows are read one at a time, when the page asks."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from concept_ablation.common.image_store import ImageStore, open_picture, open_store
from concept_ablation.common.interference_table import DRAWN
from concept_ablation.common.roles import probe_roles
from concept_ablation.report.comebacks import attack_section
from concept_ablation.report.figures import PLAIN, thumbnail
from concept_ablation.report.formatting import flat_settings
from concept_ablation.report.full_size import FullSize
from concept_ablation.report.pictures import Pair, probe_pictures, read_record
from concept_ablation.report.strength import read_looks
from concept_ablation.report.summary import training_record

log = logging.getLogger(__name__)
UNHARMED = 4
"""The most pairs of pictures of a victim that isn't harmed."""

UNLISTED = ("probes", "stage")
"""What the list of a row's settings leaves out: the page shows the prompts beside the pictures."""


class Deciding(NamedTuple):
    """The target that speaks for its row: the shares of its images, by the measure that decides, and their number.

    low, high: the interval of `ablated` alone.
    """

    target: str
    base: float
    ablated: float
    low: float
    high: float
    images: int


def deciding_targets(lines: Sequence[Mapping], scores: pa.Table) -> list[Deciding]:
    """For each line of the summary its deciding target, read in the long table: the summary's own columns pool all targets."""
    asked = pa.array([line["deciding_target"] for line in lines], pa.string())
    chosen = pc.and_(pc.equal(scores["role"], "target"), pc.is_in(scores["probe"], asked))
    chosen = pc.and_(
        chosen, pc.is_in(scores["metric"], pa.array([line["measure"] for line in lines], pa.string()))
    )
    found = {
        tuple(score[name] for name in ("concept", "probe", "metric", "side")): score
        for score in scores.filter(chosen).to_pylist()
    }
    deciding = []
    for line in lines:
        place = line["concept"], line["deciding_target"], line["measure"]
        base, ablated = (found[*place, side] for side in ("base", "ablated"))
        numbers = (ablated[name] for name in ("value", "ci_low", "ci_high", "n"))
        deciding.append(Deciding(line["deciding_target"], base["value"], *numbers))
    return deciding


def previews(rows: Sequence[Mapping]) -> Iterator[tuple[str, str] | None]:
    """The target's first picture before and after, small, for each line of the page's table."""
    for row in rows:
        after = open_store(row["samples"]).select("target", row["targets"][0])
        before = open_store(row["base"][row["targets"][0]])
        yield (
            tuple(thumbnail(store.image(0), 88) for store in (before, after))
            if len(after) and len(before)
            else None
        )


def sections(
    rows: Sequence[Mapping],
    lines: Sequence[Mapping],
    scores: pa.Table,
    measured: Mapping[str, Sequence[Mapping]],
    pairs: int,
    shown: int | None,
    tried: Mapping[str, Sequence[Mapping]] | None = None,
    full: FullSize | None = None,
) -> Iterator[dict]:
    """What the page shows of each row, made when the page asks for it. `shown`: as `probes_a_row` gives it.

    measured: what the rows did to other rows' subjects, as `victims.read_interference` gives it. tried: what was tried to bring their
    targets back, as `comebacks.read_attacks` gives it. full: what keeps the probes' pictures in full size, too.
    """
    places = _places(scores["concept"])
    for row, line in zip(rows, lines, strict=True):
        samples = open_store(row["samples"])
        metrics = _metric_lines(scores.take(places.get(row["concept"], [])).to_pylist())
        training, chosen, record = training_record(row), _most_telling(row, metrics)[:shown], read_record(row)
        counts = pairs, pairs if shown is None else 0
        yield line | {
            "row": row,
            "probes": [
                _probe(
                    row,
                    samples,
                    place,
                    metrics,
                    record.get(place, ()),
                    counts if place in chosen else (0, 0),
                    full,
                )
                for place in probe_roles(row)
            ],
            "interference": _victims(row, measured.get(row["concept"], []), pairs, shown),
            "attacks": attack_section((tried or {}).get(row["concept"], ()), pairs if shown is None else 1),
            "memorized": _memorized(row),
            "metrics": metrics,
            "loss": training.get("loss", []),
            "looks": read_looks(row),
            "settings": list(flat_settings(samples.metadata, UNLISTED)),
        }


def _places(names: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Each name's places in a column."""
    codes = np.unique(names.to_numpy(), return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
    return {names[int(group[0])].as_py(): group for group in groups}


def _most_telling(row: Mapping, metrics: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Role and subject of a row's probes: targets, the anchor, then the neighbors, those that lost most first.

    They lost most of their typical images: recognition stays at its top while pictures change.
    """
    lost = {
        line["probe"]: line["difference"]["value"]
        for line in metrics
        if line["role"] == "neighbor" and line["metric"] == "typical" and "difference" in line
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
    row: Mapping,
    samples: ImageStore,
    place: tuple[str, str],
    metrics: Sequence[Mapping],
    record: Sequence[Pair],
    counts: tuple[int, int],
    full: FullSize | None,
) -> dict:
    role, subject = place
    ablated = samples.select(role, subject)
    pictures = probe_pictures(row, ablated, place, record, counts, full)
    found = {line["metric"]: line for line in metrics if (line["role"], line["probe"]) == place}
    return {"role": role, "subject": subject, "total": len(ablated), "pictures": pictures, "metrics": found}


def _pairs(before: Sequence[tuple[str, int, str]], after: Sequence[str]) -> list[dict]:
    return [
        {"prompt": prompt, "seed": seed, "base": base, "ablated": picture, **PLAIN}
        for (prompt, seed, base), picture in zip(before, after, strict=True)
    ]


def victim_ids(row: Mapping, row_id: str) -> list[str]:
    """Where the page shows each of a row's victims: those that the row draws itself among its own probes."""
    places = [list(place) for place in probe_roles(row)]
    return [
        f"{row_id}-{'probe' if victim['probed'] else 'victim'}-"
        f"{places.index(list(victim['probed'])) + 1 if victim['probed'] else number}"
        for number, victim in enumerate(row.get("interference", {}).get("victims", ()), 1)
    ]


def _victims(row: Mapping, lines: Sequence[Mapping], pairs: int, shown: int | None) -> list[dict]:
    """The row's victims, each with what it lost and, where pictures were drawn for it, the first of them.

    Fewer pairs of what isn't harmed. If the page can't show all probes, a harmed victim shows one pair, and others none.
    """
    found = []
    for place, (victim, line) in enumerate(
        zip(row.get("interference", {}).get("victims", ()), lines, strict=False)
    ):
        count = min(pairs, pairs if line["harmed"] else UNHARMED) if shown is None else int(line["harmed"])
        pictures = []
        if not victim["probed"] and count:
            after = open_store(row["interference"]["images"]).select(DRAWN.format(place)).first(count)
            before = _base_pictures(str(victim["base"]), len(after))
            pictures = _pairs(before, [thumbnail(image) for image in after.images()])
        found.append(line | victim | {"pictures": pictures, "total": line["n"]})
    return found


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
        lines.setdefault(tuple(place.values())[:3], place)[score["side"]] = score
    return list(lines.values())
