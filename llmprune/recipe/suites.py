"""Suites: named sets of lm-eval tasks, with the number of samples of each."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml


@cache
def suites() -> dict[str, dict[str, int]]:
    """Return by the name of a suite its tasks and groups, each with the maximum number of samples of a task."""
    found: dict[str, dict[str, int]] = yaml.safe_load((files("llmprune.recipe") / "suites.yaml").read_text("utf-8"))
    return found
