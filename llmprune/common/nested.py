"""Values at a place in nested mappings, such as a recipe's or a report's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def value_at(data: Any, place: Iterable[str]) -> Any:
    """Return the value that a place, one key a level, leads to; None where there is none."""
    for key in place:
        data = data.get(key) if isinstance(data, dict) else None
    return data
