"""Whole models for tasks, free generation and timing: loaded when needed, released before the next one is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from llmprune.common.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


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


def with_smaller_batches(work: Callable[[int], T], batch_size: int, *, step: str, reductions: list[str]) -> T:
    """Return ``work(batch_size)``; where a device runs out of memory, try again with half the batch.

    Each halving is logged and appended to ``reductions``. Raises EvaluationError where a batch of one does not fit.
    """
    from llmprune.common.device_errors import explain_full_memory
    from llmprune.common.out_of_memory import describe_shortage, free_cached_memory, is_out_of_memory

    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            device, _, cause = describe_shortage(error).partition("\n")
        # here the traceback, which holds the tensors of the failed attempt, is gone
        free_cached_memory()
        if batch_size == 1:
            remedy = "give less memory to the weights with model.max_memory, or choose other GPUs with devices"
            raise EvaluationError(f"{step}, with batches of 1, on {device}: {explain_full_memory(cause, remedy)}")
        batch_size //= 2
        sentence = f"{step} ran out of memory on {device}; it was repeated with batches of {batch_size}"
        reductions.append(sentence)
        logger.warning("%s", sentence)
