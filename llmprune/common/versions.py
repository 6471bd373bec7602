"""Versions and time for records."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors", "huggingface_hub")


def versions(libraries: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Return the versions of llmprune, Python and the given libraries."""
    from llmprune import __version__

    return {"llmprune": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries}


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
