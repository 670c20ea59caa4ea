"""The rooms of the package: who may import whom, that nothing imports in a circle, and how large a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "concept_ablation"
# Room -> the rooms that it may import from. Entries of registries are loaded by name, which this doesn't count.
ALLOWED = {
    "common": set(),
    "registries": {"common"},
    "prompts": {"common", "registries"},
    "kinds": {"common", "registries", "prompts"},
    "plan": {"common", "registries", "prompts", "verdict"},
    "diffusion": {"common", "registries"},
    "verdict": {"common", "registries"},
    "evaluation": {"common", "registries", "kinds", "diffusion", "verdict"},
    "methods": {"common", "registries", "prompts", "diffusion", "evaluation"},
    "report": {"common", "registries", "plan", "verdict"},
    "demo": {"common", "registries", "prompts", "plan", "diffusion"},
    "models": {"diffusion"},
    "jobs": {"common", "registries"},
    "__init__": set(),
    "__main__": {"common", "plan", "report", "diffusion", "evaluation", "demo"},
}
LAZY = {("report", "diffusion")}  # a model card reads the delta that it is about
# What planning may not load: it runs whenever Snakemake reads the workflow, and in every job.
HEAVY = {"torch", "pandas", "pyarrow", "transformers", "diffusers", "numpy", "PIL"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path, lazy: bool) -> set[str]:
    """The modules of the package that a module imports: at its top, or with `lazy` also inside functions.

    What stands below `if TYPE_CHECKING` isn't imported when the code runs.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = list(ast.walk(tree)) if lazy else tree.body
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in statements:
        if id(node) in typing or not isinstance(node, ast.ImportFrom):
            continue
        assert not node.level, f"{path}:{node.lineno}: a relative import"
        if node.module.split(".")[0] == PACKAGE.name:
            source = node.module.partition(".")[2]
            for alias in node.names:
                module = ".".join(filter(None, (source, alias.name)))
                found.add(module if module in MODULES else source or "__init__")
    return found


@pytest.mark.parametrize("lazy", [False, True])
def test_imports_point_to_the_left(lazy):
    wrong = [
        f"{module} imports {other}"
        for module, path in sorted(MODULES.items())
        for other in sorted(imports(path, lazy))
        if room(other) not in {room(module), *ALLOWED[room(module)]}
        and other != "__init__"
        and not (lazy and (room(module), room(other)) in LAZY)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    below = {module: imports(path, lazy=True) - {"__init__"} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in below.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_planning_loads_no_heavy_library():
    code = "import sys, concept_ablation.registries as registries\n"
    code += (
        "import concept_ablation.plan.checks, concept_ablation.plan.specs, concept_ablation.plan.snapshot\n"
    )
    code += "[list(registry.values()) for registry in (registries.KINDS, registries.METHODS, registries.WAYS, registries.FAMILIES)]\n"
    code += f"sys.exit(', '.join(sorted({HEAVY} & set(sys.modules))) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_entry_of_every_registry_is_there():
    from concept_ablation import registries

    for name, registry in vars(registries).items():
        if isinstance(registry, registries.Registry):
            for word, entry in registry.items():
                assert getattr(entry, "name", word) == word, (name, word)
    assert all(callable(stage.run) for stage in registries.STAGES.values())


def test_modules_and_functions_are_of_a_size_to_be_read():
    """At most 300 lines a module, and 40 a function besides its docstring."""
    long = []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 300:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                said = len((ast.get_docstring(node) or "").splitlines())
                if (lines := node.end_lineno - node.lineno + 1 - said) > 40:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert not long, "\n".join(long)
