"""The free texts of a recipe, each with its key: the values that a client chooses without a fixed set of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from llmprune.service.settings import Settings


@dataclass(frozen=True)
class FreeText:
    """A text that a client wrote into a recipe. ``key`` is its dotted key, such as ``evaluation.tasks.0``."""

    key: str
    value: str


class NotAllowedError(Exception):
    """A text breaks its rule; ``remedy`` names what to write instead."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(remedy)


# Checks a text. Returns the absolute path that replaces it in the job's recipe, None where it is used as written.
# Raises NotAllowedError.
Rule = Callable[[FreeText, Settings], Path | None]


def free_texts(value: Any, annotation: Any = None, *, key: str = "") -> Iterator[FreeText]:
    """Find every free text that was set in a recipe; fields with a fixed set of options are left out."""
    if isinstance(value, BaseModel):
        for name in sorted(value.model_fields_set):
            inner = type(value).model_fields[name].annotation
            yield from free_texts(getattr(value, name), inner, key=f"{key}.{name}" if key else name)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from free_texts(inner, annotation, key=f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from free_texts(inner, annotation, key=f"{key}.{index}")
    elif isinstance(value, str) and is_free_text(annotation):
        yield FreeText(key, value)


def is_free_text(annotation: Any) -> bool:
    """Return whether a field of this type can hold any text, directly or in a list or mapping."""
    return annotation is str or (
        get_origin(annotation) is not Literal and any(is_free_text(inner) for inner in get_args(annotation))
    )
