"""Results of one model in lm-eval tasks, sample by sample, as they are stored and compared."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Value):
    """Outcome of one document; hashes show whether two runs had the same request and the same response."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    value: float | None  # None if the metric is not a number for a single document
    answer_hash: str | None = None  # of all responses: log-likelihoods with all digits, or text


class Answer(_Value):
    """Text that a model generated in a task."""

    doc_id: int
    prompt: str
    text: str


class TaskResult(_Value):
    """Result of one task by one metric; by default the first of its metric list, with its first filter."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    value: float  # over all samples, by the task's aggregation
    samples: tuple[Sample, ...]
    group: str | None = None  # group in the recipe that includes this task
    documents: int | None = None  # all documents of the task
    values: dict[str, float] = {}  # every metric of the task, by "metric,filter"
    answers: tuple[Answer, ...] = ()  # the first few answers of a generative task


class TaskResults(_Value):
    """Results of one model in all tasks; groups and tags are listed as their tasks."""

    tasks: tuple[TaskResult, ...]

    def to_json(self) -> str:
        """Return the value as JSON text."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the text of ``to_json``. Raises pydantic's ValidationError if it is invalid."""
        return cls.model_validate_json(text)
