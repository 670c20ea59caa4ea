"""`how: uce`: Concept Editing of all rows' targets at once, in closed form; no row's delta is read.

It is method `uce` with the targets of all rows, each towards its own row's anchor. Preserved are the rows' anchors and neighbors and the
general prompts, but for those that name a target of any row. Its settings are that method's; how much is preserved grows with the rows.
"""

from __future__ import annotations

import time
from typing import ClassVar

from concept_ablation.methods.bundles.base import Way
from concept_ablation.methods.concept_editing import DEFAULTS, SCHEMA


class UceAll(Way):
    """Of keys and values of the text."""

    name = "uce"
    reads = ("prompts",)
    defaults: ClassVar = DEFAULTS
    schema: ClassVar = SCHEMA

    def needs(self, settings):
        return {"text-projections": f"how {self.name}"}

    def merge(self, spec, deltas, rows, pipeline):
        from concept_ablation.methods.concept_editing import Subjects, edit, projections

        started, settings = time.perf_counter(), self.settings_of(spec)
        kept_words, kept_prompts = preserved(rows, spec["general"])
        whole, pairs = Subjects(pipeline, "{}", settings["tokens"]), []
        kept = [whole.of(prompt) for prompt in kept_prompts]
        for template in settings["templates"]:
            subjects = Subjects(pipeline, template, settings["tokens"])
            pairs += [subjects.pair(target, row["anchor"]) for row in rows for target in row["targets"]]
            kept += [subjects.of(word) for word in kept_words]
        scales = settings["erase_scale"], settings["preserve_scale"], settings["ridge"]
        weights = projections(pipeline)
        changes = {
            name: edit(weight, pairs, kept, *scales).double() - weight.double()
            for name, weight in weights.items()
        }
        return changes, {"pairs": len(pairs), "kept": len(kept), "seconds": time.perf_counter() - started}


def preserved(rows, general):
    """Words and prompts that stay: anchors and neighbors of all rows, and general prompts, without what any row removes.

    rows: each with targets, anchor, neighbors. general: prompts.
    """
    from concept_ablation.prompts.wording import has_word

    targets = list(dict.fromkeys(target for row in rows for target in row["targets"]))
    gone = {target.casefold() for target in targets}
    words = dict.fromkeys(word for row in rows for word in (row["anchor"], *row["neighbors"]))
    prompts = [text for text in dict.fromkeys(general) if not any(has_word(text, one) for one in targets)]
    return [word for word in words if word.casefold() not in gone], prompts


WAY = UceAll()
