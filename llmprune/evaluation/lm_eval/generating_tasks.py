"""Whether tasks let the model write its answers, from their YAML files: no task code is run, no data is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprune.evaluation.lm_eval.tasks import defaults_that_name, manager_of, quiet
from llmprune.recipe.evaluation import Evaluation

_GENERATES = "generate_until"  # also lm-eval's default


def may_generate(evaluation: Evaluation) -> bool:
    """Check whether a task of the recipe generates text. True where a task is not found or is defined by a class."""
    folder = Path(evaluation.include_path).expanduser() if evaluation.include_path else None
    with quiet():
        own = manager_of(folder).task_index if folder and folder.is_dir() else {}
        others = frozenset(name for name in evaluation.task_names if name not in own)
        index = (defaults_that_name(others).task_index if others else {}) | own
    return _any_generates(evaluation.task_names, index)


def _any_generates(parts: Iterable[Any], index: dict[str, Any]) -> bool:
    return any(_generates(part, index) for part in parts)


def _generates(part: Any, index: dict[str, Any]) -> bool:
    """Check a task, group or tag; a group may define parts inline."""
    if isinstance(part, dict):
        inner = part.get("task")
        if isinstance(inner, list):
            return _any_generates(inner, index)
        return bool(part["output_type"] == _GENERATES) if "output_type" in part else _generates(inner, index)
    entry = index.get(part)
    if entry is None:
        return True
    if entry.cfg is None:  # a tag
        return _any_generates(entry.tags, index)
    if isinstance(entry.cfg.get("task"), list):
        return _any_generates(entry.cfg["task"], index)
    return "class" in entry.cfg or entry.cfg.get("output_type", _GENERATES) == _GENERATES
