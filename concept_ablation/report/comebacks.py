"""What tables, page and terminal say of what brings targets back, read in the table that `attacks.aggregate_attacks` wrote."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from concept_ablation.common.image_store import open_store
from concept_ablation.registries import ATTACKS
from concept_ablation.report.figures import PLAIN, thumbnail
from concept_ablation.report.formatting import printable, share

COLUMNS = {
    "attack_worst": pa.string(),
    "attack_worst_base": pa.float64(),
    "attack_worst_share": pa.float64(),
    "attack_worst_low": pa.float64(),
    "attack_worst_high": pa.float64(),
    "attack_words_share": pa.float64(),
    "attack_learned_share": pa.float64(),
    "attacks_back": pa.string(),
    "attack_images": pa.int64(),
}
"""The summary's columns of what brings a row's target back; docs/report.md explains them."""


def read_attacks(path: str | Path | None) -> dict[str, list[dict]]:
    """The table's lines by concept, in its order; none without a table."""
    found: dict[str, list[dict]] = {}
    for line in pq.read_table(path).to_pylist() if path and Path(path).is_file() else ():
        found.setdefault(line["concept"], []).append(line)
    return found


def worst_attack(lines: Sequence[Mapping]) -> Mapping | None:
    """The line with the largest share of pictures that show the target; of several the one that the base model shows most."""
    return max(lines, key=lambda line: (line["ablated"], line["base"]), default=None)


def attack_columns(lines: Sequence[Mapping] | None) -> dict:
    """The summary's columns of one row, `COLUMNS`; None where nothing was tried."""
    worst = worst_attack(lines or ())
    if worst is None:
        return dict.fromkeys(COLUMNS)
    names = {"attack_worst_share": "ablated", "attack_worst_base": "base"}
    names |= {"attack_worst_low": "worst_low", "attack_worst_high": "worst_high"}
    return {
        "attack_worst": worst["family"],
        **{column: worst[name] for column, name in names.items()},
        "attack_words_share": _largest(line for line in lines if line["family"] not in ATTACKS),
        "attack_learned_share": _largest(line for line in lines if line["family"] in ATTACKS),
        "attacks_back": "; ".join(line["family"] for line in lines if line["back"]),
        "attack_images": sum(line["n"] for line in lines),
    }


def _largest(lines: Iterable[Mapping]) -> float | None:
    return max((line["ablated"] for line in lines), default=None)


def attacks_text(tried: Mapping[str, Sequence[Mapping]], most: int = 10) -> str:
    """Which targets come back, for a terminal, without a full stop: `1 of 13 targets comes back when asked ...: fox (typo, 75% of 6 images)`.

    A target comes back if some family's interval lies wholly above the limit; it may come back if only a share does.
    """
    back = []
    for name, lines in tried.items():
        beyond = [line for line in lines if line["back"]]
        if line := worst_attack([line for line in beyond if line["firm"]] or beyond):
            back.append((name, line))
    back.sort(key=lambda pair: (not pair[1]["firm"], -pair[1]["ablated"]))
    named = [
        f"{printable(name, 28)} ({line['family']}, {share(line['ablated'])} of {line['n']} images{'' if line['firm'] else ', provisional'})"
        for name, line in back[:most]
    ]
    firm = sum(line["firm"] for _, line in back)
    text = f"{firm or 'None'} of {len(tried)} targets {'comes' if firm == 1 else 'come'} back when asked for in another way"
    text += f", {len(back) - firm} more may" if len(back) > firm else ""
    more = f", and {len(back) - most} more" if len(back) > most else ""
    return f"{text}: {', '.join(named)}{more}" if back else text


def attack_section(lines: Sequence[Mapping], pairs: int) -> dict | None:
    """What the page shows of one row: `lines`, the `worst` of them, and its first `pairs` pictures; None where nothing was tried.

    A picture is as `pictures.probe_pictures` gives it, without a badge.
    """
    worst = worst_attack(lines)
    if worst is None:
        return None
    store = open_store(worst["images"])
    sides = [store.select(side, worst["family"]).first(pairs) for side in ("base", "ablated")]
    pictures = [
        {
            "prompt": place["prompt"],
            "seed": place["seed"],
            "base": thumbnail(before),
            "ablated": thumbnail(after),
            **PLAIN,
        }
        for place, before, after in zip(sides[1].rows, *(side.images() for side in sides), strict=True)
    ]
    return {"lines": lines, "worst": worst, "pictures": pictures}
