"""Read `concepts.csv`: one row a concept, every mistake of the whole table reported together.

A line that is blank or starts with `#` is skipped, so a row is switched off by commenting it out. Columns may
come in any order. Each line is parsed alone: an error can name its line, and an open quote can't swallow the
rest.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from concept_ablation.validation import did_you_mean, find_problems, show, to_type

KINDS_READY = ("style", "object")
# Columns that override one value of the config for one row: column -> the path of the config's key.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "anchor_images": ("anchors", "images"),
    "anchor_guidance": ("anchors", "sampler", "guidance_scale"),
    "parameter_group": ("training", "parameter_group"),
    "loss": ("training", "loss"),
    "steps": ("training", "steps"),
    "learning_rate": ("training", "learning_rate"),
    "batch_size": ("training", "batch_size"),
    "augmentation": ("training", "augmentation"),
    "prior_preservation": ("training", "prior_preservation"),
    "prior_weight": ("training", "prior_weight"),
    "seed": ("training", "seed"),
}


class ConceptsError(ValueError):
    """The table can't be used; `str()` lists every problem: line, column, value and what is allowed."""


@dataclass(frozen=True)
class Concept:
    """One row: remove `target`, so that it becomes `anchor`, and keep `neighbors` as they are."""

    name: str
    kind: str
    target: str
    anchor: str
    neighbors: tuple[str, ...] = ()
    prompts: str | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    line: int = 0


def slug(text: str, length: int = 40) -> str:
    """`text` as a piece of a file name: lower-case letters, digits and single hyphens, at most `length`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-") or "x"


def load_concepts(path: str | Path, schema: Mapping, config_schema: Mapping) -> list[Concept]:
    """The enabled rows of the table at `path`, in the file's order.

    `schema` is `workflow/schemas/concepts.schema.yaml`; the columns of OVERRIDES are checked as
    `config.schema.yaml`, the `config_schema`, checks the keys that they override. Raises ConceptsError.
    """
    table = _Table(Path(path), _columns(schema, config_schema))
    header: list[str] | None = None
    rows: list[tuple[Concept, bool]] = []
    for line, cells in table.parse():
        if header is None:
            header = table.check_header(line, cells)
        else:
            rows += table.read_row(line, dict(zip(header, cells, strict=False)), len(header), len(cells))
    if header is None:
        table.complain(1, "has no header line", ", ".join(table.columns))
    elif not rows and not table.errors:
        table.complain(1, "has no row below its header", "one row a concept")
    table.check_works([concept for concept, _ in rows])
    enabled = [concept for concept, on in rows if on]
    if rows and not enabled and not table.errors:
        table.complain(1, "has no row that is enabled", "set 'enabled' to true in at least one row")
    table.raise_errors()
    return enabled


def _columns(schema: Mapping, config_schema: Mapping) -> dict[str, dict]:
    """Column -> its schema: the table's own columns, then the overrides with the config keys' bounds."""
    columns = dict(schema["properties"])
    for column, keys in OVERRIDES.items():
        part: Mapping = config_schema
        for key in keys:
            part = part["properties"][key]
        columns[column] = dict(part)
    return columns


class _Table:
    """One file being read: its known columns and the errors found so far."""

    def __init__(self, path: Path, columns: Mapping[str, dict]) -> None:
        self.path, self.columns = path, columns
        self.errors: list[tuple[int, str]] = []
        self.names: dict[str, int] = {}

    def complain(self, line: int, message: str, allowed: str = "", column: str = "") -> None:
        where = f"column {column!r}: " if column else ""
        self.errors.append((line, where + message + (f" (allowed: {allowed})" if allowed else "")))

    def raise_errors(self) -> None:
        if not self.errors:
            return
        count = len(self.errors)
        lines = [
            f"  {self.path}:{line}: {message}" for line, message in sorted(self.errors, key=lambda e: e[0])
        ]
        raise ConceptsError("\n".join([f"{self.path}: {count} error{'s' if count > 1 else ''}", *lines]))

    def parse(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of each line that is neither blank nor a comment."""
        for line, text in enumerate(re.split(r"\r\n|\n|\r", self._text()), start=1):
            if not text.strip() or text.lstrip().startswith("#"):
                continue
            try:
                cells = next(csv.reader([text], strict=True, skipinitialspace=True))
            except (csv.Error, StopIteration) as error:
                self.complain(
                    line, f"is not valid CSV: {error}; close every quote, and write a quote inside as two"
                )
                continue
            yield line, [cell.strip() for cell in cells]

    def _text(self) -> str:
        """The file's text; an unreadable file or a wrong encoding ends the reading at once."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            self.complain(
                1, f"can't be read: {error.strerror}; write the table there or set `concepts` in the config"
            )
            self.raise_errors()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            self.complain(
                line, f"byte 0x{data[error.start]:02x} is not UTF-8", "UTF-8; save the file as 'CSV UTF-8'"
            )
            self.raise_errors()
            raise AssertionError from error

    def check_header(self, line: int, cells: list[str]) -> list[str]:
        """The column names; complains about unknown, repeated and missing ones."""
        header = [cell.lower() for cell in cells]
        if len(cells) == 1 and (";" in cells[0] or "\t" in cells[0]):
            self.complain(line, "separates columns by ';' or tabs", "commas; ';' separates neighbors")
            self.raise_errors()
        for column in header:
            if column not in self.columns:
                self.complain(
                    line, f"unknown column {show(column)}{did_you_mean(column, self.columns)}", self._names()
                )
            elif header.count(column) > 1:
                self.complain(line, "stands twice in the header", column=column)
        for column in ("kind", "target", "anchor"):
            if column not in header:
                self.complain(line, f"column {column!r} is missing", self._names())
        return header

    def _names(self) -> str:
        return ", ".join(self.columns)

    def read_row(
        self, line: int, cells: dict[str, str], width: int, count: int
    ) -> list[tuple[Concept, bool]]:
        """The row as a Concept and whether it is enabled; an empty list if it can't be made into one."""
        before = len(self.errors)
        if count > width:
            self.complain(line, f"has {count} values under {width} columns; quote a value that holds a comma")
        known = {column: cell for column, cell in cells.items() if column in self.columns}
        values = {
            c: to_type(cell, self.columns[c].get("type", "string")) for c, cell in known.items() if cell
        }
        for column in ("kind", "target", "anchor"):
            if column in cells and not cells[column]:
                self.complain(line, "is empty", "a value in every row", column)
        if "neighbors" in values:
            words = [word.strip() for word in values["neighbors"].split(";")]
            values["neighbors"] = [word for word in words if word]
        for problem in find_problems(values, {"properties": self.columns}):
            column, _, _index = problem.path.partition(".")
            self.complain(line, problem.message, self._allowed(column, problem.message), column)
        self._check_words(line, values)
        if name := values.get("concept"):
            self._check_name(line, name)
        if len(self.errors) > before or not {"kind", "target", "anchor"} <= values.keys():
            return []
        enabled = values.pop("enabled", True)
        name = values.pop("concept", None)
        if name is None:
            self._check_name(line, name := slug(f"{values['kind']}-{values['target']}"))
        fixed = {key: values.pop(key) for key in ("kind", "target", "anchor")}
        neighbors = tuple(values.pop("neighbors", ()))
        prompts = values.pop("prompts", None)
        return [
            (
                Concept(name, **fixed, neighbors=neighbors, prompts=prompts, overrides=values, line=line),
                enabled,
            )
        ]

    def _allowed(self, column: str, message: str) -> str:
        """What the column allows, as its schema's description says, unless the message has said it."""
        return "" if " is not one of " in message else self.columns[column].get("description", "")

    def _check_words(self, line: int, values: Mapping) -> None:
        """Rules between a row's columns: the kind is ready, target, anchor and neighbors all differ."""
        kind, target, anchor = (values.get(column) for column in ("kind", "target", "anchor"))
        schema = self.columns["kind"].get("enum", ())
        if kind in schema and kind not in KINDS_READY and values.get("enabled") is not False:
            ready = " or ".join(KINDS_READY)
            self.complain(
                line, f"{show(kind)} can't be ablated yet", f"{ready}, or set 'enabled' to no", "kind"
            )
        if target and anchor and target.casefold() == anchor.casefold():
            self.complain(line, f"{show(anchor)} is the target itself", "a broader concept", "anchor")
        seen: set[str] = set()
        for word in values.get("neighbors", ()):
            for role, other in (("target", target), ("anchor", anchor)):
                if other and word.casefold() == other.casefold():
                    self.complain(
                        line, f"{show(word)} is the {role}", "other concepts, to be kept", "neighbors"
                    )
            if word.casefold() in seen:
                self.complain(line, f"{show(word)} stands twice", "each neighbor once", "neighbors")
            seen.add(word.casefold())

    def _check_name(self, line: int, name: str) -> None:
        """A name stands once in the table, in whatever case."""
        first = self.names.setdefault(name.lower(), line)
        if first != line:
            self.complain(line, f"{show(name)} is the name of line {first}", "a name of its own", "concept")

    def check_works(self, rows: list[Concept]) -> None:
        """Two rows of the same work are a mistake, whatever their names; reported at the second one."""
        works: dict[tuple, int] = {}
        for row in rows:
            overrides = tuple(sorted(row.overrides.items()))
            first = works.setdefault(
                (row.kind, row.target.casefold(), row.anchor.casefold(), row.prompts, overrides), row.line
            )
            if first != row.line:
                message = f"{show(row.target)} -> {show(row.anchor)} is the same work as line {first}"
                self.complain(row.line, message, "each target, anchor and settings once", "target")
