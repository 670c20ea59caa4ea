"""Stage `share_prompts`: what the rows of a bundle preserve together, where each of their trainings preserves all of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.common.files import atomic_output
from concept_ablation.methods.ablation.preservation import prompts_of_all, read_rows

log = logging.getLogger(__name__)


def share_prompts(spec: Mapping, anchors: Sequence[str | Path], prompts: str | Path) -> None:
    """Write the prompts of all rows' anchors and neighbors, and the general ones, without those that name a target of any row.

    anchors: files of anchor prompts, in the order of the spec's `prompts`. Raises PromptsError.
    """
    rows = read_rows(spec["concepts"], spec["prompts"], anchors)
    found = prompts_of_all(rows, spec["general"])
    with atomic_output(prompts) as part:
        part.write_text(json.dumps({"prompts": found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("%d prompts of %d rows", len(found), len(rows))
