"""Method `ablation`: Kumari et al., ICCV 2023. On the anchor's pictures, the target's prediction is moved to the anchor's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from concept_ablation.common.needs import Need
from concept_ablation.methods.base import Method
from concept_ablation.prompts.templates import general_prompts


class Ablation(Method):
    """Its settings are the config's `training`, since the recipes of `presets` are written in them."""

    name = "ablation"
    hardens = True

    def fields(self, settings: Mapping) -> tuple[str, ...]:
        training = settings["training"]
        needs_neighbors = (
            self.validates(settings) or training["preserve"] != "none" or training["start"] != "none"
        )
        return (*self.row_fields, "neighbors") if needs_neighbors else self.row_fields

    def groups(self, settings: Mapping) -> set[str]:
        training = settings["training"]
        return {rung.get("parameter_group", training["parameter_group"]) for rung in _rungs(training)}

    def validates(self, settings: Mapping) -> bool:
        return settings["training"]["strength"] == "auto"

    def needs(self, settings: Mapping) -> dict[Need, str]:
        training, found = settings["training"], {}
        for preserve in (rung.get("preserve", training["preserve"]) for rung in _rungs(training)):
            if preserve in ("null-space", "both"):
                found["text-projections"] = f"training.preserve {preserve}"
        if training["start"] != "none":
            found["text-projections"] = f"training.start {training['start']}"
        if training["detach_bos"]:
            found["begin-of-text"] = "training.detach_bos true"
        if settings["anchors"]["negative_target"]:
            found["guidance"] = "anchors.negative_target true"
        return found

    def mistake(self, settings: Mapping) -> str | None:
        """The null space is that of keys and values of the text, so no other parameters can be kept in it."""
        training = settings["training"]
        if wrong := _unhardened(training):
            return wrong
        for number, rung in enumerate(_rungs(training), 1):
            preserve, group = (rung.get(name, training[name]) for name in ("preserve", "parameter_group"))
            if training["start"] != "none" and group != "cross-attn":
                return f"training.start {training['start']} edits keys and values of the text, and training.parameter_group is {group} (allowed with it: none)"
            if preserve in ("null-space", "both") and group != "cross-attn":
                where = f"training.search.ladder, rung {number}: " if rung else ""
                more = "; training.strength fixed climbs no ladder" if rung else ""
                return (
                    f"{where}training.preserve {preserve} needs training.parameter_group cross-attn, not {group}, since it keeps "
                    f"keys and values of the text (allowed with {group}: none, distill{more})"
                )
        return None

    def work(self, settings: Mapping, templates: list[str]) -> dict:
        training = {**settings["training"], "style_templates": templates}
        training["group"], seed, harden = (
            training.pop(name) for name in ("parameter_group", "seed", "harden")
        )
        search, general = training.pop("search"), training.pop("preserve_prompts")
        work = {"method": self.name, "training": training, "seed": seed}
        if self.validates(settings):  # batches and seeds of its pictures are in `validation`
            work["search"] = {name: search[name] for name in ("looks", "scales", "ladder")}
        if harden["every"]:
            _harden(work, {**harden, "sampler": settings["anchors"]["sampler"]})
        ways = {rung.get("preserve", training["preserve"]) for rung in _rungs(settings["training"])}
        if ways == {"none"}:
            del training["preserve_weight"], training["preserve_tolerance"]
        else:
            work["preserve_prompts"] = general_prompts(general, settings["prompts"]["slots"])
        return work

    def templates(self, spec: Mapping) -> list[str]:
        return spec["training"]["style_templates"]

    def run(
        self,
        spec: Mapping,
        anchors: str | Path | None,
        delta: str | Path,
        training: str | Path,
        *,
        device: str,
        checkpoint_steps: int,
    ) -> None:
        from concept_ablation.methods.ablation.stage import ablate_concept

        # Beside the outputs, but no output: what Snakemake would remove when the job is killed.
        folder = Path(delta).parent
        checkpoint = folder.parents[1] / "checkpoints" / f"{folder.name}.pt"
        ablate_concept(
            spec,
            anchors,
            delta,
            training,
            device=device,
            checkpoint_path=checkpoint,
            checkpoint_steps=checkpoint_steps,
        )


def _rungs(training: Mapping) -> Sequence[Mapping]:
    """What replaces a row's settings in each of its trainings: the ladder's rungs, or once nothing."""
    return training["search"]["ladder"] if training["strength"] == "auto" else [{}]


def _harden(work: dict, harden: dict) -> None:
    """Make a hardened training of the one in `work`: attacked as `harden` says, preserving less exactly, and not ended early."""
    least = harden.pop("preserve_tolerance")
    work["harden"] = harden
    work["training"]["preserve_tolerance"] = max(least, work["training"]["preserve_tolerance"])
    if "search" in work:  # a training that ends at an early look would be attacked too seldom
        ladder = [
            rung | {name: max(least, rung[name]) for name in ("preserve_tolerance",) if name in rung}
            for rung in work["search"]["ladder"]
        ]
        work["search"] |= {"looks": [], "ladder": ladder}


def _unhardened(training: Mapping) -> str | None:
    """Why attacks on a training would do nothing; None: they aren't asked for, or do something."""
    every, steps = training["harden"]["every"], training["steps"]
    groups = {rung.get("parameter_group", training["parameter_group"]) for rung in _rungs(training)}
    if every and "embedding" in groups:
        return (
            "training.harden learns token embeddings in place of the target's, and training.parameter_group embedding trains the "
            "target's own alone, so nothing would be moved (allowed with hardening: cross-attn, attn, full-weight)"
        )
    if every and every >= steps:
        return f"training.harden.every is {every}, so none of {steps} steps comes after an attack (allowed: 0, which is off, to {steps - 1})"
    return None


METHOD = Ablation()
