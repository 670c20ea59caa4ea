"""The lock on the stages' code: an edit that may change a stage's output forces a decision about its version.

Results are named by their specs, and a spec holds its stage's version, not its code. So the code that each
stage runs is hashed here, comments, formatting and docstrings aside, and compared with `stage_lock.json`.
`python -m tests.test_stage_lock` writes that file anew.
"""

import ast
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from concept_ablation import registries
from concept_ablation.registries import STAGES

ROOT = Path(__file__).parents[1]
LOCK = Path(__file__).with_name("stage_lock.json")
ACCEPT = "python -m tests.test_stage_lock"
PACKAGE = "concept_ablation"
ENTRY = rf"{PACKAGE}\.[\w.]+:\w+"  # how a registry names what it holds


class Module:
    """One module of the package: its top-level definitions and what it imports from the package."""

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.definitions: dict[str, list[ast.stmt]] = defaultdict(list)
        for statement in tree.body:
            for name in _bound(statement):
                self.definitions[name].append(statement)
        # The name used here -> module and name there; a module that is imported itself is a name of its room.
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: a relative import, which this lock can't follow")
            if node.module.split(".")[0] == PACKAGE:
                source = node.module.partition(".")[2]
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (source, alias.name)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a top-level definition or assignment binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return [
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
    return []


def _plain(node: object) -> object:
    """A syntax tree as lists, without positions, docstrings and empty fields: the same in every Python."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [
        type(node).__name__,
        *([name, _plain(value)] for name, value in sorted(fields.items()) if value not in (None, [])),
    ]


def _place(target: str) -> tuple[str, str]:
    """Module, without the package's name, and name of what `module:name` names."""
    module, _, name = target.partition(":")
    return module.removeprefix(f"{PACKAGE}."), name


REGISTRIES = {
    ("registries", name): value
    for name, value in vars(registries).items()
    if isinstance(value, registries.Registry)
}


class Package:
    """The package below `root`: what each stage runs, found by following the names that its code uses."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folder = root / PACKAGE
        self.modules = {
            ".".join(path.relative_to(folder).with_suffix("").parts): Module(path)
            for path in folder.rglob("*.py")
        }

    def code(self, function: str) -> dict[str, str]:
        """Module -> 12 hex of the code that `function`, "module:name", runs there."""
        reached: set[tuple[str, str]] = set()
        self._follow(*_place(function), reached)
        parts = defaultdict(list)
        for module, name in sorted(reached):
            parts[module].append([name, _plain(self.modules[module].definitions[name])])
        return {
            module: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12]
            for module, part in parts.items()
        }

    def _follow(self, module: str, name: str, reached: set[tuple[str, str]]) -> None:
        """Add a definition, and those of the package that it uses, to `reached`."""
        if (module, name) in reached or module not in self.modules:
            return
        here = self.modules[module]
        if (module, name) in REGISTRIES:  # the lines of such a table are no code; what they name is
            for target in REGISTRIES[module, name].targets.values():
                self._follow(*_place(target), reached)
            return
        if name in here.definitions:
            reached.add((module, name))
        for statement in here.definitions.get(name, ()):
            for used in self._used(here, module, statement):
                self._follow(*used, reached)

    def _used(self, here: Module, module: str, statement: ast.stmt) -> Iterator[tuple[str, str]]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                imported = ".".join(filter(None, here.imports.get(node.value.id, ())))
                if imported in self.modules:
                    yield imported, node.attr
            elif isinstance(node, ast.Name):
                yield here.imports.get(node.id, (module, node.id))


def current(root: Path = ROOT) -> dict[str, dict]:
    """What the lock file should hold now."""
    package = Package(root)
    return {
        name: {"version": stage.version, "code": package.code(stage.function)}
        for name, stage in sorted(STAGES.items())
    }


def complaints(lock: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """One message for each stage that differs from the lock: what changed and what to do."""
    found = []
    for stage in sorted(lock.keys() | now.keys()):
        old, new = lock.get(stage), now.get(stage)
        if old == new:
            continue
        if old is None or new is None:
            found.append(f"{stage}: the stage is {'new' if old is None else 'gone'}. Run `{ACCEPT}`.")
        elif new["version"] != old["version"]:
            fault = " A version is only ever raised." if new["version"] < old["version"] else ""
            found.append(
                f"{stage}: version {old['version']} is now {new['version']}.{fault} Run `{ACCEPT}` to record it."
            )
        else:
            parts = [
                f"{PACKAGE}/{name.replace('.', '/')}.py"
                for name in sorted(old["code"] | new["code"])
                if old["code"].get(name) != new["code"].get(name)
            ]
            found.append(
                f"{stage}: its code in {', '.join(parts)} changed. If its output "
                f"changes for the same spec, raise its version in STAGES of {PACKAGE}/registries.py, so that old results "
                f"are made anew. Then, or at once if the output stays the same, run `{ACCEPT}`."
            )
    return found


def test_the_stages_code_is_as_the_lock_file_has_it():
    found = complaints(json.loads(LOCK.read_text(encoding="utf-8")), current())
    assert not found, "\n" + "\n".join(found)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and the scripts, to be edited; `edit(module, old, new)` gives what changed."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    before = current(tmp_path)

    def edit(module: str, old: str, new: str) -> set[str]:
        path = tmp_path / PACKAGE / f"{module.replace('.', '/')}.py"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        now = current(tmp_path)
        return {stage for stage in STAGES if before[stage] != now[stage]}

    return edit


def test_an_edit_asks_for_the_stages_that_run_it_and_no_others(copy):
    changed = copy("methods.ablation.losses", "error.sum((1, 2, 3)) / mask", "error.sum((1, 2, 3)) * mask")
    assert changed == {"ablate_concept", "train_bundle", "repair_bundle"}


def test_what_a_registry_names_counts_for_the_stages_that_look_into_it(copy):
    assert copy("prompts.wording", 'noun[:-1] + "ies"', 'noun[:-1] + "ys"') == {
        "write_prompts",
        "ablate_concept",
        "merge_deltas",
        "train_bundle",
        "repair_bundle",
        "share_prompts",
        "sample_ablated",  # where it counts pictures, it judges them as the next one does
        "score_concept",  # it asks a kind for its limit, and is taken to run all that the kinds run
        "measure_interference",
        "probe_wordings",
        "attack_concept",
    }


def test_code_that_stages_share_asks_for_all_of_them(copy):
    torch_stages = {
        "search_prompts",
        "generate_anchors",
        "ablate_concept",
        "import_delta",
        "merge_deltas",
        "train_bundle",
        "repair_bundle",
        "sample_base",
        "sample_ablated",
        "measure_interference",
        "probe_wordings",
        "attack_concept",
    }
    assert (
        copy("diffusion.families.base", "class ModelError(UserError)", "class ModelError(RuntimeError)")
        == torch_stages
    )


def test_an_entry_of_a_registry_asks_for_the_stages_that_read_the_registry(copy):
    assert (
        copy("evaluation.metrics.kid_x1000", "1000 * kid.low", "999 * kid.low")
        == {
            "score_concept",
            "sample_ablated",
            "measure_interference",
            "probe_wordings",
            "attack_concept",
            "repair_bundle",
            "ablate_concept",  # its search for a strength measures, and is taken to measure all that the report does
        }
    )


def test_comments_docstrings_and_blank_lines_ask_for_nothing(copy):
    assert (
        copy(
            "prompts.wording",
            "def plural(noun: str) -> str:\n",
            "# The plural.\n\n\ndef plural(noun: str)->str:\n",
        )
        == set()
    )
    assert copy("prompts.wording", '"""The regular English plural', '"""One plural') == set()


def test_the_message_says_what_to_do():
    old = {"sample_base": {"version": 1, "code": {"diffusion.pipeline": "a", "diffusion.sampler": "b"}}}
    edited = {"sample_base": {"version": 1, "code": {"diffusion.pipeline": "a", "diffusion.sampler": "c"}}}
    (message,) = complaints(old, edited)
    for part in (
        "sample_base",
        "concept_ablation/diffusion/sampler.py",
        "STAGES of concept_ablation/registries.py",
        ACCEPT,
    ):
        assert part in message
    assert "pipeline.py" not in message
    raised = {"sample_base": {"version": 2, "code": {"diffusion.pipeline": "a", "diffusion.sampler": "c"}}}
    assert "version 1 is now 2" in complaints(old, raised)[0] and not complaints(raised, raised)
    assert "only ever raised" in complaints(raised, old)[0]


if __name__ == "__main__":
    LOCK.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {LOCK.relative_to(ROOT)}")
