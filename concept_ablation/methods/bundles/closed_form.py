"""`how: closed-form`: the change of keys and values that does to each row's tokens what the row's own does; see `merging`.

A row's tokens are those of its target prompts, as training words them, without begin-of-text, which every prompt has. Preserved are
all tokens of the empty prompt and of the rows' anchors, neighbors and general prompts, but for prompts that name a target of any row;
and the words that the text encoder knows (`vocabulary`), without those of targets.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from concept_ablation.methods.bundles.base import Way

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from concept_ablation.methods.bundles.deltas import Deltas

log = logging.getLogger(__name__)


class ClosedFormMerge(Way):
    """Of keys and values of the text. `ridge`, `preserve_weight`, `reach`: see `merging`. `vocabulary`: most words that are preserved."""

    name = "closed-form"
    reads = ("deltas", "prompts")
    settings = ("ridge", "preserve_weight")
    defaults: ClassVar = {"vocabulary": 3000, "reach": 1.15}
    schema: ClassVar = {
        "vocabulary": {"type": "integer", "minimum": 0, "maximum": 100_000},
        "reach": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    }
    groups = frozenset({"cross-attn", "embedding"})  # rows of a token embedding are joined
    takes = "keys and values of the text"

    def needs(self, settings):
        return {"text-projections": f"how {self.name}"}

    def merge(self, spec, deltas, rows, pipeline):
        from concept_ablation.methods.ablation.conditioning import Encoder
        from concept_ablation.methods.ablation.preservation import prompts_of_all, second_moment
        from concept_ablation.methods.bundles.vocabulary import frequent_words, word_tokens, words_of_targets
        from concept_ablation.methods.merging import ClosedForm

        _check_linear(deltas, pipeline)
        encoder, sums, where = Encoder(pipeline), ClosedForm(), next(iter(deltas.base.values())).device
        for row, change in zip(rows, deltas.changes(), strict=True):
            moment = second_moment(hidden[:, 1:] for hidden in encoder.hidden(row["target_prompts"]))
            sums.add(change, moment.to(where))
        if not sums.outputs:  # token rows alone
            return {}, {"fit": {}}
        kept = ["", *prompts_of_all(rows, spec["general"])]
        preserved = second_moment(encoder.hidden(kept)).to(where)
        own = self.settings_of(spec)
        tokenizer = next(iter(encoder.family.tokenizers(pipeline).values()))
        words = frequent_words(tokenizer, own["vocabulary"], words_of_targets(rows))
        tokens = word_tokens(encoder, words).to(where) if words else None
        merged, fit = sums.solve(preserved, spec["preserve_weight"], spec["ridge"], tokens, own["reach"])
        log.info(
            "lost %.3f of what the rows change, moved preserved tokens by %.3f of it", fit.lost, fit.moved
        )
        return merged, {"fit": {"lost": fit.lost, "moved": fit.moved}}


def _check_linear(deltas: Deltas, pipeline: DiffusionPipeline) -> None:
    """Raises MergeError for a change of other parameters than keys and values."""
    from concept_ablation.diffusion.delta import parse_token_row
    from concept_ablation.diffusion.families.base import family_of
    from concept_ablation.methods.bundles.deltas import MergeError

    family = family_of(pipeline)
    layers = family.text_projections(family.network(pipeline))
    linear = {f"{family.network_name}.{name}.weight" for name in layers}
    other = [name for name in deltas.base if name not in linear and not parse_token_row(name)]
    if other:
        raise MergeError(
            f"{deltas.holder(other[0])}: changes {other[0]}, which is no key or value of the text, so `how: closed-form` can't "
            "merge it (allowed: sum, ties)"
        )


WAY = ClosedFormMerge()
