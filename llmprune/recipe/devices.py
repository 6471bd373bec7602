"""The recipe's ``devices``: the GPUs that a run uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmprune.common.schema import Positive


def _checked(value: Any) -> Any:
    """Return a choice of devices with its list as a tuple. Raises ValueError for lists that name no GPUs."""
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError("a number of GPUs is at least 1; [0] is the first GPU, and all without a GPU is the CPU")
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("an empty list names no GPU; name at least one, such as [0], or write all")
    if any(not isinstance(gpu, int) or isinstance(gpu, bool) or gpu < 0 for gpu in value):
        raise ValueError("a list holds the numbers of GPUs as torch counts the visible ones, from 0, such as [0, 2]")
    if len(set(value)) < len(value):
        raise ValueError("a GPU is named twice; name each once")
    return tuple(value)


DeviceChoice = Annotated[Literal["all"] | Positive | tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_checked)]
