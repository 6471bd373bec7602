"""What one model reached in lm-eval's tasks, sample by sample: the values that are stored and joined."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Value):
    """One document's outcome; the hashes tell whether two runs asked the same question, and got the same answer."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    value: float | None  # None where the metric is no number for a single document
    answer_hash: str | None = None  # of all that the model answered: log-likelihoods to the last bit, or text


class Answer(_Value):
    """What a model wrote in a generative task."""

    doc_id: int
    prompt: str
    text: str


class TaskResult(_Value):
    """One task's chosen metric; by default the first of its metric list, under its first filter."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    value: float  # over all samples, aggregated as the task says
    samples: tuple[Sample, ...]
    group: str | None = None  # the group that the recipe named and this task came with
    documents: int | None = None  # that the task has in all
    values: dict[str, float] = {}  # every metric of the task, by "metric,filter"
    answers: tuple[Answer, ...] = ()  # the first few, of a generative task


class TaskResults(_Value):
    """What one model reached in every task; groups and tags stand as their tasks."""

    tasks: tuple[TaskResult, ...]

    def to_json(self) -> str:
        """The whole value as text for a product file."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``; raises pydantic's ValidationError on anything else."""
        return cls.model_validate_json(text)
