"""The recipes of environments say what pyproject.toml says: it alone holds the versions."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pip_part(path: str) -> list[str]:
    environment = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    (part,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    return part


def test_the_rules_environment_has_the_projects_versions():
    wanted = [name for name in PROJECT["dependencies"] if not name.startswith("snakemake")]
    assert pip_part("workflow/envs/python.yaml") == wanted, "copy the versions from pyproject.toml"


def test_the_other_recipes_install_the_project_itself():
    assert pip_part("environment.yaml") == ["--editable ."]
    for recipe in ("Dockerfile", "apptainer.def"):
        text = (ROOT / recipe).read_text(encoding="utf-8")
        assert (
            re.search(r"pip install --no-cache-dir '/\S+/build\[gpu,nudenet\]'", text)
            and "pyproject.toml" in text
        )
        assert not re.search(r"[a-z]==\d", text)
        (base,) = re.findall(r"(?im)^from:? (\S+)", text)
        assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
