"""Read `concepts.csv`, one row a concept. All mistakes in the table are reported together.

Blank lines and lines that start with `#` are skipped, so a row can be commented out. Columns may come in any order.
Each line is parsed alone, so that an error can name its line and an open quote can't swallow the rest of the table.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from concept_ablation.common.errors import UserError, did_you_mean, show
from concept_ablation.plan.concept import OVERRIDES, SECTIONS, Concept, slug
from concept_ablation.plan.schema import find_problems, to_type
from concept_ablation.registries import KINDS

LISTS = ("target", "neighbors", "synonyms", "bundle")  # columns of several values, separated by `;`
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories


class ConceptsError(UserError):
    """The table can't be used; `str()` lists every problem: line, column, value and what is allowed."""


def hidden(text: str) -> str | None:
    """The first invisible character of a text, or None: control characters, direction marks, line separators.

    The two joiners (U+200C, U+200D) are allowed, since some scripts and emoji need them.
    """
    return next((c for c in text if unicodedata.category(c) in HIDDEN and c not in "\u200c\u200d"), None)


def load_concepts(
    path: str | Path, schema: Mapping, config_schema: Mapping, disabled: bool = False
) -> list[Concept]:
    """The enabled rows of the table at `path`, or all of them if `disabled`, in the file's order.

    `schema`: that of the table, `concepts.schema.yaml`; `config_schema`: that of the config, which checks the columns
    that override a config key. Raises ConceptsError.
    """
    table = _Table(Path(path), _columns(schema, config_schema))
    header: list[str] | None = None
    rows: list[Concept] = []
    for line, cells in table.parse():
        if header is None:
            header = table.check_header(line, cells)
        else:
            rows += table.read_row(line, dict(zip(header, cells, strict=False)), len(header), len(cells))
    if header is None:
        table.complain(1, "has no header line", table.names_allowed())
    elif not rows and not table.errors:
        table.complain(1, "has no row below its header", "one row a concept")
    table.check_works(rows)
    enabled = [concept for concept in rows if concept.enabled]
    if rows and not enabled and not table.errors:
        table.complain(1, "has no row that is enabled", "set 'enabled' to true in at least one row")
    table.raise_errors()
    return rows if disabled else enabled


def _columns(schema: Mapping, config_schema: Mapping) -> dict[str, dict]:
    """Column -> its schema: the table's own, then those that override a config key, by short and dotted name."""
    values = {}

    def collect(part: Mapping, path: str) -> None:
        for name, inner in part.get("properties", {}).items():
            if "properties" in inner:
                collect(inner, f"{path}.{name}")
            elif not {"array", "object"} & set(_kinds_of(inner)):
                values[f"{path}.{name}"] = dict(inner)

    for section in SECTIONS:
        collect(config_schema["properties"][section], section)
    short = {column: values[path] for column, path in OVERRIDES.items()}
    return {**schema["properties"], **short, **values}


def _kinds_of(schema: Mapping) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


class _Table:
    """A table while it is read: its columns and the errors found so far."""

    def __init__(self, path: Path, columns: Mapping[str, dict]) -> None:
        self.path, self.columns = path, columns
        self.errors: list[tuple[int, str]] = []
        self.names: dict[str, int] = {}
        self.bundles: dict[str, tuple[str, int]] = {}  # in lower case -> as its first line writes it

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
        """The line number and cells of each line that is neither blank nor a comment."""
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
        """The file's text. Raises ConceptsError at once if it can't be read or isn't UTF-8."""
        if self.path.exists() and not self.path.is_file():  # reading a device or a pipe would never end
            self.complain(
                1, "can't be read: it is not a regular file; set `concepts` in the config to a CSV file"
            )
            self.raise_errors()
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
        """The column names. Unknown, repeated and missing ones are recorded as errors."""
        header = [cell.lower() for cell in cells]
        if len(cells) == 1 and (";" in cells[0] or "\t" in cells[0]):
            self.complain(line, "separates columns by ';' or tabs", "commas; ';' separates neighbors")
            self.raise_errors()
        for column in header:
            if column not in self.columns:
                dotted = [
                    f" (did you mean {name!r}?)" for name in self.columns if name.endswith(f".{column}")
                ]
                hint = dotted[0] if dotted else did_you_mean(column, self.columns)
                self.complain(line, f"unknown column {show(column)}{hint}", self.names_allowed())
            elif header.count(column) > 1 or OVERRIDES.get(column) in header:
                twin = OVERRIDES[column] if OVERRIDES.get(column) in header else column
                self.complain(line, f"occurs twice in the header, as {twin!r}", "one of them", column)
        for column in ("kind", "target", "anchor"):
            if column not in header:
                self.complain(line, f"column {column!r} is missing", self.names_allowed())
        return header

    def names_allowed(self) -> str:
        """The columns as messages list them, the dotted ones summed up."""
        return ", ".join([name for name in self.columns if "." not in name] + ["and dotted config keys"])

    def read_row(self, line: int, cells: dict[str, str], width: int, count: int) -> list[Concept]:
        """The row as a list of one Concept; an empty list if it has a mistake."""
        before = len(self.errors)
        if count > width:
            self.complain(line, f"has {count} values under {width} columns; quote a value that holds a comma")
        known = {column: cell for column, cell in cells.items() if column in self.columns}
        for column in [column for column, cell in known.items() if hidden(cell)]:
            found = hidden(known.pop(column))
            self.complain(
                line, f"holds the invisible character U+{ord(found):04X}", "visible characters", column
            )
        values = {
            c: to_type(cell, self.columns[c].get("type", "string")) for c, cell in known.items() if cell
        }
        for column in ("kind", "target", "anchor"):
            if column in cells and not cells[column]:
                self.complain(line, "is empty", "a value in every row", column)
        for column in LISTS:
            if column in values:
                values[column] = self._list(line, column, values)
        for problem in find_problems(values, {"properties": self.columns}):
            column = problem.path if problem.path in self.columns else problem.path.partition(".")[0]
            self.complain(line, problem.message, self._allowed(column, problem.message), column)
        self._check_words(line, values)
        self._check_bundles(line, values.get("bundle", ()))
        if name := values.get("concept"):
            self._check_name(line, name)
        if len(self.errors) > before or not {"kind", "target", "anchor"} <= values.keys():
            return []
        enabled = values.pop("enabled", True)
        name = values.pop("concept", None)
        if name is None:
            self._check_name(line, name := slug(f"{values['kind']}-{'-'.join(values['target'])}"))
        targets, neighbors, synonyms, bundles = (tuple(values.pop(column, ())) for column in LISTS)
        fixed = {column: values.pop(column) for column in ("kind", "anchor")}
        fixed |= {column: values.pop(column, None) for column in ("prompts", "image", "delta", "preset")}
        overrides = {OVERRIDES.get(column, column): value for column, value in values.items()}
        words = {"targets": targets, "neighbors": neighbors, "synonyms": synonyms, "bundles": bundles}
        return [Concept(name, **words, **fixed, overrides=overrides, line=line, enabled=enabled)]

    def _list(self, line: int, column: str, values: Mapping) -> list[str]:
        """A column's values. Among bundles a missing one is an error, since a bundle would lack the row."""
        one = column == "target" and values.get("kind") in KINDS and KINDS[values["kind"]].one_target
        words = [word.strip() for word in ([values[column]] if one else values[column].split(";"))]
        if column == "bundle" and not all(words):
            message = (
                f"{show(values[column])} lacks a name beside a ';': write it there, or leave that ';' out"
            )
            self.complain(line, message, self._allowed(column, ""), column)
        return [word for word in words if word]

    def _allowed(self, column: str, message: str) -> str:
        """What the column allows, from its schema's description; empty if the message already says it."""
        return "" if " is not one of " in message else self.columns[column].get("description", "")

    def _check_words(self, line: int, values: Mapping) -> None:
        """Check columns against each other: what the kind needs, and that targets, anchor and neighbors all differ."""
        kind, anchor = values.get("kind"), values.get("anchor")
        targets = [word.casefold() for word in values.get("target", ())]
        needs_image = kind in KINDS and KINDS[kind].needs_image
        if needs_image and "image" not in values:
            self.complain(line, "is empty", f"kind {kind} needs the path of the memorized picture", "image")
        if not needs_image and "image" in values:
            having = " and ".join(name for name in KINDS if KINDS[name].needs_image)
            self.complain(line, f"is only for kind {having}", "leave it empty", "image")
        if anchor and anchor.casefold() in targets:
            self.complain(line, f"{show(anchor)} is the target itself", "a broader concept", "anchor")
        for word in sorted({word for word in targets if targets.count(word) > 1}):
            self.complain(line, f"{show(word)} occurs twice", "each target once", "target")
        seen: set[str] = set()
        for word in values.get("neighbors", ()):
            for role, others in (("target", targets), ("anchor", [anchor.casefold()] if anchor else [])):
                if word.casefold() in others:
                    self.complain(
                        line, f"{show(word)} is the {role}", "other concepts, to be kept", "neighbors"
                    )
            if word.casefold() in seen:
                self.complain(line, f"{show(word)} occurs twice", "each neighbor once", "neighbors")
            seen.add(word.casefold())

    def _check_name(self, line: int, name: str) -> None:
        """Record an error if another row has the same name, in any case."""
        first = self.names.setdefault(name.lower(), line)
        if first != line:
            self.complain(line, f"{show(name)} is the name of line {first}", "a name of its own", "concept")

    def _check_bundles(self, line: int, names: Sequence[str]) -> None:
        """Record an error for a bundle that the row names twice, or that another row writes in another case."""
        for place, name in enumerate(names):
            first, where = self.bundles.setdefault(name.casefold(), (name, line))
            if name.casefold() in (other.casefold() for other in names[:place]):
                self.complain(line, f"{show(name)} occurs twice", "each bundle once", "bundle")
            elif first != name:
                self.complain(
                    line, f"{show(name)} is {show(first)} in line {where}", "one spelling", "bundle"
                )

    def check_works(self, rows: list[Concept]) -> None:
        """Record an error for each row that repeats an earlier row's work under another name."""
        works: dict[tuple, int] = {}
        for row in rows:
            targets = tuple(target.casefold() for target in row.targets)
            sources = (row.prompts, row.image, row.delta, row.preset)
            work = (row.kind, targets, row.anchor.casefold(), sources, tuple(sorted(row.overrides.items())))
            first = works.setdefault(work, row.line)
            if first != row.line:
                message = f"{show(row.target)} -> {show(row.anchor)} is the same work as line {first}"
                self.complain(row.line, message, "each target, anchor and settings once", "target")
