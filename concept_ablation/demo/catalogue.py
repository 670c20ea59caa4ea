"""What there is to try: the rows and bundles of a plan whose deltas are there, and the prompts that the report draws of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from concept_ablation.plan.graph import Bundle, Plan, PlanError, Row, has_content
from concept_ablation.prompts.wording import has_word
from concept_ablation.registries import KINDS, method_of

PICTURES = {"row": 4, "bundle": 1}
"""How many of a probe's pictures are offered as examples; of a bundle the targets' alone are."""


@dataclass(frozen=True)
class Example:
    """A picture of the report: its probe's role and subject, its prompt and its seed."""

    role: str
    subject: str
    prompt: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.role} {self.subject}: {self.prompt} · seed {self.seed}"


@dataclass(frozen=True)
class Choice:
    """A row or a bundle that can be tried.

    name: its name, with "bundle" before it for a bundle. short: the target, if no other row removes it, else the name. title: of its
    pictures. about: what it removes. delta: the path of its delta. sampler: the one of its pictures in the report. veiled: whether the
    report hides them until a reader asks.
    """

    name: str
    short: str
    title: str
    about: str
    delta: str
    sampler: Mapping[str, object]
    veiled: bool
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Catalogue:
    """The base model, as a spec has it, and all choices by name.

    unsafe: the targets of the rows whose pictures are veiled; unsafe_prompts: the prompts that the report asks for them with.
    """

    model: Mapping[str, object]
    choices: Mapping[str, Choice]
    unsafe: frozenset[str]
    unsafe_prompts: frozenset[str]

    def is_veiled(self, prompt: str, names: Sequence[str]) -> bool:
        """Whether pictures of `prompt` by these choices are to be hidden until a reader asks for them.

        They are where one of the choices is a row of unsafe content, and where the prompt asks for what such a row removes.
        """
        asked = prompt in self.unsafe_prompts or any(has_word(prompt, target) for target in self.unsafe)
        return asked or any(self.choices[name].veiled for name in names)


def make_catalogue(plan: Plan, sampler: Mapping[str, object]) -> Catalogue:
    """All rows and bundles of `plan` whose delta is there and changes weights. `sampler`: of bundles that aren't judged (the config's).

    Raises PlanError if there are none.
    """
    made = [row for row in plan.rows if _changes_weights(plan, row) and has_content(plan.path(row.ablation))]
    targets = Counter(row.concept.target for row in made)
    rows = [_of_row(plan, row, targets[row.concept.target] == 1) for row in made]
    bundles = [
        _of_bundle(plan, bundle, sampler) for bundle in plan.bundles if has_content(plan.path(bundle.delta))
    ]
    if not rows and not bundles:
        raise PlanError(
            f"{plan.results}: none of the {len(plan.rows)} rows of the table has a delta there yet; run the workflow first "
            "(make run), or give the overlays of the run's config with --configfile"
        )
    veiled = [row for row in plan.rows if KINDS[row.concept.kind].veiled]
    return Catalogue(
        model=_sampling(plan, plan.rows[0])["model"],
        choices={choice.name: choice for choice in [*rows, *bundles]},
        unsafe=frozenset(target for row in veiled for target in row.concept.targets),
        unsafe_prompts=frozenset(
            prompt
            for row in veiled
            for probe in _sampling(plan, row)["probes"]
            if probe["role"] not in ("anchor", "neighbor")
            for prompt in probe["prompts"]
        ),
    )


def _changes_weights(plan: Plan, row: Row) -> bool:
    """Whether the row's method makes a change whose strength can be set; a negative prompt is none."""
    spec = plan.specs["ablate_concept"].get(row.ablation)  # an imported delta has none
    return spec is None or method_of(spec).changes_weights


def _sampling(plan: Plan, row: Row) -> Mapping:
    return plan.specs["sample_ablated"][row.samples]


def _of_row(plan: Plan, row: Row, only: bool) -> Choice:
    """A row. `only`: no other row removes the same, so that its target names it."""
    concept, spec = row.concept, _sampling(plan, row)
    short = concept.target if only else concept.name
    about = f"{concept.target} → {concept.anchor} · {concept.kind}"
    return Choice(
        name=concept.name,
        short=short,
        title=f"without {short}",
        about=about if only else f"{about} · {concept.name}",
        delta=plan.path(row.ablation),
        sampler=spec["sampler"],
        veiled=KINDS[concept.kind].veiled,
        examples=tuple(_examples(spec["probes"], PICTURES["row"])),
    )


def _of_bundle(plan: Plan, bundle: Bundle, sampler: Mapping[str, object]) -> Choice:
    specs = [_sampling(plan, row) for row in bundle.judged]
    targets = [probe for spec in specs for probe in spec["probes"] if probe["role"] == "target"]
    return Choice(
        name=f"bundle {bundle.name}",
        short=f"bundle {bundle.name}",
        title=f"bundle {bundle.name}",
        about=f"bundle {bundle.name}: {len(bundle.concepts)} concepts · {bundle.how}",
        delta=plan.path(bundle.delta),
        sampler=specs[0]["sampler"] if specs else sampler,
        # Its pictures are of all its rows' subjects. Those of an unsafe one are known by their prompt.
        veiled=False,
        examples=tuple(_examples(targets, PICTURES["bundle"])),
    )


def _examples(probes: Sequence[Mapping], most: int) -> Iterator[Example]:
    """The first pictures of each probe: image i has prompt i (modulo their number) and seed + i."""
    for probe in probes:
        for index in range(min(most, probe["images"])):
            prompt = probe["prompts"][index % len(probe["prompts"])]
            yield Example(probe["role"], probe["subject"], prompt, probe["seed"] + index)
