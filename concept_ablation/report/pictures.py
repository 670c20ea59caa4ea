"""A probe's pictures on the page: the first ones and those that count most against the row, with what each metric says of them.

The numbers are those of the row's record of pictures (`results/images/KEY.parquet`), from which every score can be computed.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from concept_ablation.common.image_store import ImageStore, open_store
from concept_ablation.registries import KINDS, METRICS
from concept_ablation.report.figures import thumbnail
from concept_ablation.report.formatting import format_metric, is_share
from concept_ablation.report.full_size import FullSize
from concept_ablation.report.tables import read_part

Side = Mapping[str, object]
"""A line of the record."""

JUDGED = {"neighbor": ("recognition", "typical"), "anchor": ("typical",)}
"""What a picture of a probe that is to stay is judged by; of a target and its paraphrases it is the kind's measure."""

LOST = {"recognition": "not recognised", "typical": "not typical"}


class Pair(NamedTuple):
    """What the record says of the two pictures of a seed."""

    base: Side
    ablated: Side


def read_record(row: Mapping) -> dict[tuple[str, str], list[Pair]]:
    """Role and subject -> the pairs of its pictures, in the order of their seeds; nothing for results of an older version.

    Raises TableError if the record is damaged.
    """
    path = row.get("images")
    if not path or not Path(path).is_file():
        return {}
    sides: dict[tuple[str, str], dict[str, list[Side]]] = {}
    for line in read_part(path, "records of pictures").to_pylist():
        place = sides.setdefault((line["role"], line["subject"]), {"base": [], "ablated": []})
        if line["side"] in place:
            place[line["side"]].append(line)
    return {place: [Pair(*pair) for pair in zip(*both.values(), strict=False)] for place, both in sides.items()}  # fmt: skip


def badge(row: Mapping, role: str, pair: Pair | None) -> str:
    """Why the judge counts the ablated picture against the row, in a word or two; empty where it doesn't."""
    if pair is None:
        return ""
    if role in JUDGED:
        return next((LOST[name] for name in JUDGED[role] if _number(pair.ablated, name, 1.0) < 0.5), "")
    measure = METRICS[KINDS[row["kind"]].measure]
    return (measure.label or "still there") if _number(pair.ablated, measure.name, 0.0) >= 0.5 else ""


def worst_first(row: Mapping, role: str, pairs: Sequence[Pair]) -> list[int]:
    """The places of a probe's pairs, those that count most against the row first.

    Of a target: counted ones, then those nearest to its text (or to the memorized picture). Of what is to stay: those not
    recognised and not typical, then those least like the base model's picture of the seed.
    """

    def against(place: int) -> tuple[float, ...]:
        after = pairs[place].ablated
        if role in JUDGED:
            lost = sum(_number(after, name, 1.0) < 0.5 for name in JUDGED[role])
            return -lost, _number(after, "image_similarity", 1.0), place
        counted = _number(after, KINDS[row["kind"]].measure, 0.0)
        near = max(_number(after, "copy_similarity", -1.0), -1.0), _number(after, "clip_cosine", 0.0)
        return -counted, -near[0], -near[1], place

    return sorted(range(len(pairs)), key=against)


def probe_pictures(
    row: Mapping,
    samples: ImageStore,
    place: tuple[str, str],
    pairs: Sequence[Pair],
    counts: tuple[int, int],
    full: FullSize | None = None,
) -> list[dict]:
    """The pictures of a probe that the page shows: its first ones, then those of the worst that aren't among them.

    place: role and subject. pairs: the record's, empty without one. counts: how many first ones and how many of the worst. full: keeps
    them in full size, too, but for those of a kind whose pictures are veiled.
    Each: prompt, seed, base and ablated (data URIs), badge, first (bool), worst (its rank from 0, or None), more (what the
    enlarged picture tells).
    """
    role, subject = place
    full = None if KINDS[row["kind"]].veiled else full
    first = range(min(counts[0], len(samples)))
    ranks = {found: rank for rank, found in enumerate(worst_first(row, role, pairs)[: counts[1]])}
    found = []
    for number in [*first, *sorted(set(ranks) - set(first))]:
        pair = pairs[number] if number < len(pairs) else None
        prompt, seed, base = _base_picture(str(row["base"][subject]), number, full if pair else None)
        after = samples.image(number)
        if full and pair:
            full.keep(pair.ablated["key"], pair.ablated["position"], after)
        found.append(
            {
                "prompt": prompt,
                "seed": seed,
                "base": base,
                "ablated": thumbnail(after),
                "badge": badge(row, role, pair),
                "first": number in first,
                "worst": ranks.get(number),
                "more": _told(pair) if pair else {},
            }
        )
    return found


def _told(pair: Pair) -> dict:
    """What the record says of a pair, as texts: metrics before and after, nearest texts, the pictures' places."""
    values = [
        [name, *(_text(side.get(name), name) for side in pair)]
        for name in METRICS
        if pair.ablated.get(name) is not None
    ]
    return {
        "values": [*values, ["nearest text", *(side["nearest_text"] for side in pair)]],
        "where": [[f"{folder}/{side['key']}.parquet", side["position"]] for folder, side in zip(("base", "samples"), pair, strict=True)],
    }  # fmt: skip


def _text(value: float | None, name: str) -> str:
    """What a metric says of one picture: a share is yes or no there, or the part of a tie."""
    return {0.0: "no", 1.0: "yes"}.get(value) if is_share(name) and value in (0.0, 1.0) else format_metric(value, name)  # fmt: skip


def _number(side: Side, name: str, otherwise: float) -> float:
    value = side.get(name)
    return otherwise if value is None else float(value)


@lru_cache(maxsize=2048)
def _base_picture(path: str, place: int, full: FullSize | None) -> tuple[str, int, str]:
    """Prompt, seed and picture of a base store's image; rows share these stores."""
    store, key = _base_store(path), Path(path).stem
    picture = store.image(place)
    if full:
        full.keep(key, place, picture)
    return store.rows[place]["prompt"], store.rows[place]["seed"], thumbnail(picture)


@lru_cache(maxsize=8)
def _base_store(path: str) -> ImageStore:
    return open_store(path)
