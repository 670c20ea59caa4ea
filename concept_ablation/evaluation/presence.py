"""Whether pictures still show a row's target, by the measure that decides for the row's kind, whatever prompt they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from concept_ablation.common.attack_table import SIDES
from concept_ablation.common.image_store import ImageStore, Pictures
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.image_models import ImageModels
from concept_ablation.evaluation.metrics.base import ImageMetric
from concept_ablation.evaluation.row import Probe, Row
from concept_ablation.evaluation.statistics import proportion
from concept_ablation.registries import KINDS, METRICS


class PresenceJudge:
    """Tells which pictures show one of a row's targets.

    What other prompts bring is often neither target nor anchor, and is still nearer to one of the two texts. So where texts decide, a
    picture must also reach a target's *floor*: halfway between the medians of its cosine with the target's text over the unchanged
    model's pictures of the target and over those of the anchor.

    Args:
        spec: kind, targets, anchor, texts (subject -> text, of the targets and the anchor), scorer {model, pretrained}; as the kind
            needs them image and descriptor, or detector, as `scoring.score_concept` takes them; floors (target -> cosine), if known.
        shown: the unchanged model's pictures of each target; neutral: of the anchor. They give the floors where the spec doesn't.

    Raises:
        FeatureError, and as the kind needs them MemorizationError, DetectorError.
    """

    def __init__(
        self,
        spec: Mapping,
        device: str = "cpu",
        shown: Sequence[ImageStore | Pictures] = (),
        neutral: ImageStore | Pictures | None = None,
    ) -> None:
        self.kind, self.spec = KINDS[spec["kind"]], spec
        scorer = ClipScorer(spec["scorer"]["model"], spec["scorer"].get("pretrained"), device)
        self.models = ImageModels(spec, scorer, device)
        self.texts = dict(zip(spec["texts"], scorer.text_features(list(spec["texts"].values())), strict=True))
        self.floors: dict[str, float] = dict(spec.get("floors", {}))
        if shown and not self.floors and not isinstance(METRICS[self.kind.measure], ImageMetric):
            low = self._features(neutral)
            for target, pictures in zip(spec["targets"], shown, strict=True):
                ends = [
                    np.median(features @ self.texts[target]) for features in (self._features(pictures), low)
                ]
                self.floors[target] = float(np.mean(ends))

    def _features(self, pictures: ImageStore | Pictures) -> np.ndarray:
        """(n, d), rows of length 1."""
        return self.models.scorer.image_features(pictures.images(), self.models.batch_size)

    def seen(self, pictures: ImageStore | Pictures) -> np.ndarray:
        """(n,): 1 where a picture shows a target, 0 where not, between them where two texts are equally near."""
        metric = METRICS[self.kind.measure]
        if isinstance(metric, ImageMetric):
            return np.asarray(metric.read(pictures, self.models), dtype=np.float64)
        features = self._features(pictures)
        # In the role of a paraphrase any target counts, whichever the prompt asked for.
        probe = Probe("paraphrase", "", features, features)
        targets = tuple(self.spec["targets"])
        row = Row(self.kind, targets, self.spec["anchor"], (), self.texts, [probe])
        reached = [features @ self.texts[target] >= floor for target, floor in self.floors.items()]
        return metric.values(probe, row).ablated * (np.any(reached, axis=0) if reached else 1)


def family_line(
    family: str, seen: Mapping[str, np.ndarray], confidence: float, families: int = 1, **more: object
) -> dict:
    """One line of the table of attacks.

    Args:
        seen: side ("base", "ablated", "control") -> (n,), what `PresenceJudge.seen` says of its pictures.
        families: how many are tried. `worst_low` and `worst_high` are the interval of the ablated share that holds for all of
            them at once, each at the level 1 - (1 - confidence) / families (Bonferroni): the worst one is chosen for its share.
        more: `budget`, `learned`.
    """
    share = partial(proportion, seen["ablated"])
    line: dict[str, object] = {"family": family, "n": len(seen["ablated"])} | more
    for side in SIDES:
        if side in seen:
            one = proportion(seen[side], confidence=confidence)
            line |= {side: one.value, f"{side}_low": one.low, f"{side}_high": one.high}
            line[f"{side}_seen"] = [float(value) for value in seen[side]]
    worst = share(confidence=1 - (1 - confidence) / families)
    return line | {"worst_low": worst.low, "worst_high": worst.high}


def numbered(prompts: Sequence[str], seed: int, role: str, subject: str) -> list[dict]:
    """The rows of an image store, still without pictures: prompt i has the seed `seed` + i."""
    return [
        {"prompt": prompt, "seed": seed + index, "index": index, "role": role, "subject": subject}
        for index, prompt in enumerate(prompts)
    ]
