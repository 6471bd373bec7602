"""Exit codes by error, and the settings of the service that have no option."""

from __future__ import annotations

import inspect
from pathlib import Path

from llmprune.common import errors
from llmprune.service.settings import Settings

# Settings that an operator cannot change by an option: what each limits.
FIXED_LIMITS = {
    "log_limit": "bytes of one job's log; a job that writes more is ended",
    "rate": "requests of one caller per second, after a burst",
    "burst": "requests of one caller that may come at once",
    "requests": "requests of one caller at a time; twice as many from one address",
    "streams": "event streams of one caller at a time; twice as many from one address, 8 times as many in all",
    "body_limit": "bytes of a request's body; the recipe itself may have 32 KB",
    "grace": "seconds between SIGTERM and SIGKILL when a job is ended",
}


def exit_codes() -> str:
    """Markdown table of the public exceptions with the exit code of each."""
    kinds = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    rows = [
        f"| `{kind.__name__}` | {kind.exit_code} | {' '.join((kind.__doc__ or '').split())} |"
        for kind in kinds
        if issubclass(kind, errors.LLMPruneError)
    ]
    return "\n".join(["| exception | exit code | meaning |", "|---|---|---|", *rows])


def fixed_limits() -> str:
    """Markdown table of the service's fixed limits with their values."""
    values = Settings(data_dir=Path())
    rows = [f"| {meaning} | {_number(getattr(values, name))} |" for name, meaning in FIXED_LIMITS.items()]
    return "\n".join(["| limit | value |", "|---|---|", *rows])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value}"
