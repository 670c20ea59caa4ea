"""The plan: every stage's units of work, their specs and keys, and which rows are finished.

A *spec* is a dict of everything that decides a stage's output; it names upstream work by key. A *key* is
`<slug>.<12 hex digits of the spec's SHA-256>` and names the output's file. So equal work has one key and is done
once, and an edited row gets new keys while all others keep theirs. Nothing here imports torch or pandas, since this
runs whenever Snakemake reads the workflow.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from concept_ablation.common.errors import UserError
from concept_ablation.common.settings import without
from concept_ablation.plan.concept import slug
from concept_ablation.plan.reported import reported
from concept_ablation.plan.rows import Bundle, Row
from concept_ablation.registries import STAGES


class PlanError(UserError):
    """The rows can't be planned; `str()` lists every problem, one a line."""


def has_content(path: str) -> bool:
    """Whether the file exists and isn't empty; a full disk or a power cut can leave an empty one."""
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


def canonical(spec: object) -> str:
    """`spec` as JSON with sorted keys and no spaces: equal specs give equal texts."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def make_key(label: str, spec: Mapping) -> str:
    """The content-addressed key of `spec`; its readable part is made of `label`."""
    return f"{slug(label)}.{hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]}"


def _parts(value: object) -> Collection:
    """The values of an entry of a spec: those of a group or a list, or the only one."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else (value,)


class Plan:
    """The work of all rows: `rows` and `bundles`, sorted by name, and the specs of every stage by key."""

    def __init__(self, results: str, verdict: Mapping[str, float], page: Mapping[str, int]) -> None:
        self.results = results
        self.report = {"verdict": dict(verdict), "page": dict(page)}
        self.rows: list[Row] = []
        self.bundles: list[Bundle] = []
        self.specs: dict[str, dict[str, dict]] = {stage: {} for stage in STAGES}
        self.stages: dict[str, str] = {}  # key -> its stage
        # Of the base model's pictures (plan/stores.py): the key of a store that isn't made -> that of the longer one which is read; and
        # the key of one that is made -> that of a shorter one which is there.
        self.longer: dict[str, str] = {}
        self.starts: dict[str, str] = {}
        # Slugs of rows that are switched off and can't be planned, so that their keys aren't known.
        self.unknown: set[str] = set()

    def add(self, stage: str, label: str, spec: Mapping) -> str:
        """Add one unit of work and return its key. Equal work is added once.

        Settings that have the value in the stage's `Stage.neutral` are left out of the spec.
        """
        full = {"stage": stage, "version": STAGES[stage].version, **without(spec, STAGES[stage].neutral)}
        key = make_key(label, full)
        self.specs[stage][key], self.stages[key] = full, stage
        return key

    def spec(self, stage: str, key: str) -> str:
        """A unit's spec as canonical JSON: the only parameter of its rule."""
        return canonical(self.specs[stage][key])

    def path(self, key: str) -> str:
        """The file that the unit of work with this key writes."""
        key = self.longer.get(key, key)
        return f"{self.results}/{STAGES[self.stages[key]].path.format(key=key)}"

    def start(self, key: str) -> str | list[str]:
        """The store whose pictures are the first ones of a unit of `sample_base`; none where it draws all itself."""
        return self.path(self.starts[key]) if key in self.starts else []

    def upstream(self, stage: str, key: str, name: str) -> str | list[str]:
        """The file or files that a unit of `stage` reads as input `name`; its spec has their keys under that name."""
        found = self.specs[stage][key].get(name) or {}
        return self.path(found) if isinstance(found, str) else [self.path(k) for k in _parts(found)]

    def files(self, row: Row) -> list[str]:
        """All files of a row that the report reads."""
        files = [self.path(key) for key in (row.ablation, row.samples, row.scores)] + [self.image_record(row)]
        files += self.interference_files(row).values()
        files += [file for one in self.attack_files(row) for file in one.values()]
        # Where no strength was searched, the table of looks is empty, and results of before it was written lack it.
        searched = "search" in self.specs[self.stages[row.ablation]][row.ablation]
        records = [self.training_record(row, name) for name in ("training", *["strength"] * searched)]
        return (
            files
            + [record for record in records if record]
            + [self.path(key) for key in dict.fromkeys(row.base.values())]
        )

    def interference_files(self, row: Row) -> dict[str, str]:
        """The table and the pictures of what a row's model does to other rows' subjects, by name; empty if that isn't measured."""
        return self.unit_files(row.interference.key) if row.interference else {}

    def attack_files(self, row: Row) -> list[dict[str, str]]:
        """The files of each thing that tries to bring a row's target back, by name."""
        return [self.unit_files(key) for key in row.attacks]

    def unit_files(self, key: str) -> dict[str, str]:
        """All files of a unit of work, by name."""
        files = STAGES[self.stages[key]].files
        return {name: f"{self.results}/{path.format(key=key)}" for name, path in files.items()}

    def training_record(self, row: Row, name: str = "training") -> str | None:
        """A table that `ablate_concept` writes beside its delta, of steps or of looks; None for an imported delta."""
        trained = self.stages[row.ablation] == "ablate_concept"
        record = STAGES["ablate_concept"].files[name].format(key=row.ablation)
        return f"{self.results}/{record}" if trained else None

    def image_record(self, row: Row) -> str:
        """The table that `score_concept` writes beside its scores, a line a picture."""
        return f"{self.results}/{STAGES['score_concept'].files['images'].format(key=row.scores)}"

    @functools.cached_property
    def pending(self) -> list[Row]:
        """The rows that were unfinished when this was first read. Only these are part of the workflow."""
        return self.unfinished()

    def unfinished(self, judged: bool = False, among: Sequence[Row] | None = None) -> list[Row]:
        """The rows (or those of `among`) with a file that is missing or empty now. `judged`: which aren't judged yet, whatever else is missing."""
        rows = self.rows if among is None else among
        rows = [replace(row, interference=None, attacks=()) for row in rows] if judged else rows
        return [row for row in rows if not all(map(has_content, self.files(row)))]

    @functools.cached_property
    def pending_bundles(self) -> list[Bundle]:
        """The bundles that were unfinished when this was first read."""
        return [bundle for bundle in self.bundles if not self.is_finished(bundle)]

    @property
    def measures_interference(self) -> bool:
        """Whether the report has a table of what rows do to other rows' subjects."""
        return any(row.interference for row in self.rows)

    @property
    def attacks_rows(self) -> bool:
        """Whether the report has a table of what brings targets back."""
        return any(row.attacks for row in self.rows)

    @property
    def judges_bundles(self) -> bool:
        """Whether the report has a table of bundles."""
        return any(bundle.judged for bundle in self.bundles)

    def is_finished(self, bundle: Bundle) -> bool:
        """Whether no file of a bundle is missing or empty now."""
        return all(map(has_content, self.bundle_files(bundle)))

    def bundle_files(self, bundle: Bundle) -> list[str]:
        """All files of a bundle: its delta and, where it is judged, what the report reads of it."""
        files = [*map(self.path, bundle.ends), *(file for row in bundle.judged for file in self.files(row))]
        return list(dict.fromkeys(files))

    def pending_files(self) -> list[str]:
        """The files of all unfinished rows and bundles, which the report waits for."""
        found = {file for bundle in self.pending_bundles for file in self.bundle_files(bundle)}
        return sorted(found | {file for row in self.pending for file in self.files(row)})

    def small_files(self) -> list[str]:
        """Of `pending_files` the rows' tables and the bundles' deltas: the smallest that stand for all, if each has to be fetched."""
        small = ("scores", "interference", "wordings", "attacks", "bundles", "trained", "repaired", "general")
        folders = tuple(f"{self.results}/{name}/" for name in small)
        large = ".images.parquet"
        return [
            file for file in self.pending_files() if file.startswith(folders) and not file.endswith(large)
        ]

    def goals(self) -> list[str]:
        """The targets that finish all that is unfinished: as few files as possible, since each costs planning time.

        A row's scores are made last, so they stand for all its files, unless they exist while another file is missing. Its
        interference and its attacks are beside them.
        """
        found = {self.path(bundle.delta) for bundle in self.pending_bundles if not bundle.judged}
        found |= {self.path(bundle.general) for bundle in self.pending_bundles if bundle.general}
        for row in [*self.pending, *(row for bundle in self.pending_bundles for row in bundle.judged)]:
            last = [self.path(key) for key in row.last]
            found.update(self.files(row) if any(map(has_content, last)) else last)
        return sorted(found)

    def report_spec(self, rows: Sequence[Row] | None = None) -> str:
        """All rows and bundles (or `rows` and what is finished of the bundles), with their files and the report's settings, as canonical JSON."""
        if rows is None:
            return self._whole_report
        bundles = [bundle for bundle in self.bundles if bundle.judged and self.is_finished(bundle)]
        return canonical(reported(self, rows, bundles))

    @functools.cached_property
    def _whole_report(self) -> str:  # a parameter of each rule of the report, so it is made once
        return canonical(reported(self, self.rows, [bundle for bundle in self.bundles if bundle.judged]))

    def sources(self, key: str) -> Iterator[str]:
        """The keys of the work that a unit is made from, which its spec names."""
        for value in self.specs[self.stages[key]][key].values():
            for name in _parts(value):
                name = self.longer.get(name, name) if isinstance(name, str) else None
                if name in self.stages:
                    yield name

    def needed(self, row: Row | str) -> dict[str, None]:
        """The keys of all work that a row, or the work with this key, needs, each after the work that it is made from."""
        found: dict[str, None] = {}

        def visit(key: str) -> None:
            for name in self.sources(key):
                if name not in found:
                    visit(name)
            found[key] = None

        for key in [row] if isinstance(row, str) else row.last:
            visit(key)
        return found

    def summary(self) -> str:
        """One line: how many rows there are, how many are finished, which are not, and which finished ones are measured further.

        A new row may be near a finished one, which then is tried on the new row's subjects; its training and its verdict stay.
        """
        due = [row.concept.name for row in self.unfinished(judged=True, among=self.pending)]
        known = set(due)
        more = [row.concept.name for row in self.pending if row.concept.name not in known]
        text = (
            f"{len(self.rows)} concepts: {len(self.rows) - len(due)} finished, {len(due)} to do{_listed(due)}"
        )
        if more:
            text += (
                f"; measurements to add to finished ones, without new training: {len(more)}{_listed(more)}"
            )
        bundles = [bundle.name for bundle in self.pending_bundles]
        return text + (f"; bundles to do: {len(bundles)}{_listed(bundles)}" if bundles else "")


def _listed(names: Sequence[str], most: int = 10) -> str:
    """ " (fox, owl and 3 more)"; nothing for no names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f" ({', '.join(names[:most])}{more})" if names else ""
