"""The name of a run, by which its tables can be told from another run's, and when it began.

The run's main process sets it in its environment, and so its jobs have it, on other machines too.
"""

import os
import secrets
from datetime import UTC, datetime

VARIABLE = "CONCEPT_ABLATION_RUN"
_FORM = "%Y%m%dT%H%M%SZ"


def start_run() -> str:
    """Name the run that begins now, such as `20260102T030405Z-9f3a`: the time in UTC, and four random digits."""
    os.environ[VARIABLE] = f"{datetime.now(UTC).strftime(_FORM)}-{secrets.token_hex(2)}"
    return os.environ[VARIABLE]


def run_id() -> str | None:
    """The name of the run that goes on; None outside of one."""
    return os.environ.get(VARIABLE)


def run_began() -> float | None:
    """When the run began, in seconds since 1970; None outside of a run."""
    try:
        return datetime.strptime((run_id() or "").partition("-")[0], _FORM).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
