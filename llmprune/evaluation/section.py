"""The recipe's ``evaluation`` section: what is measured on the dense and on the pruned model."""

from __future__ import annotations

from pydantic import Field, field_validator

from llmprune.calibration import TokenWindows
from llmprune.schema import Section


class Perplexity(TokenWindows):
    """Held-out text for perplexity, in the words of the calibration section."""

    def shape(self) -> tuple[int, int]:
        """(N, L) where the recipe says neither samples nor sequence_length."""
        return self.samples or 32, self.sequence_length or 2048


class Speed(Section):
    """Generation speed of dense and pruned, measured in turn in one process."""

    batch_size: int = Field(1, gt=0, description="Prompts that are continued together.")
    prompt_tokens: int = Field(64, gt=0, description="Tokens of each prompt.")
    new_tokens: int = Field(32, gt=1, description="Tokens generated after each prompt.")
    repeats: int = Field(3, gt=0, description="Timed pairs; the median counts.")


class Gate(Section):
    """The bar that the pruned model must clear; below it the run ends with exit code 3."""

    min_retention: float = Field(gt=0, le=1, description="Least mean over tasks of pruned metric / dense metric.")


class Evaluation(Section):
    """What is measured on the dense and on the pruned model, with the same settings."""

    perplexity: Perplexity | None = Field(None, description="Held-out text.")
    tasks: tuple[str, ...] = Field((), strict=False, description="lm-eval task or group names.")
    include_path: str | None = Field(None, description="Folder of further lm-eval task files; they may run code.")
    limit: int | None = Field(None, gt=0, description="Most samples a task; null: all.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null: the task's own.")
    batch_size: int = Field(8, gt=0, description="Requests that go through the model together.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the few-shot choice.")
    speed: Speed | None = Field(None, description="Generation speed.")
    gate: Gate | None = Field(None, description="The bar that decides the exit code.")

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} named twice; name each task once")
        return tasks
