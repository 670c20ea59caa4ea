"""The fixtures of the workflow's tests."""

from tests.workflow.conftest import make_checkout, models

__all__ = ["make_checkout", "models"]
