"""Whole models for tasks, free generation and timing: loaded when needed, released before the next one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WholeModel:
    """A whole model, loaded when it is first asked for.

    ``reductions``: a sentence for each batch size that was halved for want of memory, for the report.
    """

    def __init__(self, load: Callable[[], PreTrainedModel]) -> None:
        self._load = load
        self._model: PreTrainedModel | None = None
        self.reductions: list[str] = []

    def get(self) -> PreTrainedModel:
        """Return the model, loaded now if it is not."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Drop the model, and give the memory that it had on a device back."""
        from llmprune.common.out_of_memory import free_cached_memory

        if self._model is not None:
            self._model = None
            free_cached_memory()
