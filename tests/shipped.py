"""What the shipped config says, for tests that need a report's settings: the code has no defaults of its own."""

from pathlib import Path

import yaml

from concept_ablation.verdict import Thresholds

CONFIG = yaml.safe_load((Path(__file__).parents[1] / "config" / "config.yaml").read_text(encoding="utf-8"))


def thresholds(**changed: float) -> Thresholds:
    """The config's thresholds, but for those that are given."""
    return Thresholds(**CONFIG["verdict"] | changed)


def report_spec(rows: list, **page: int) -> dict:
    """A report's spec: these rows, the config's thresholds, and its page but for what is given."""
    return {"rows": rows, "verdict": CONFIG["verdict"], "page": CONFIG["report"] | page}
