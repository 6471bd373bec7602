"""Versions of the libraries that compute, and the time, for records."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors", "huggingface_hub")


def versions(libraries: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Versions of llmprune, Python and the libraries that compute."""
    from llmprune import __version__

    return {"llmprune": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
