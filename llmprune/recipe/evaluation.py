"""The recipe's ``evaluation`` section: measurements of the dense and of the pruned model."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from llmprune.common.schema import Section
from llmprune.recipe.calibration import TokenWindows

Bar = Annotated[float, Field(gt=0, le=1)]
Argument = str | int | float | bool


class Perplexity(TokenWindows):
    """Held-out text for perplexity, with the keys of the calibration section."""

    def shape(self) -> tuple[int, int]:
        """Return (N, L): the recipe's, else the tokens file's, else 32 windows of 2048 tokens."""
        samples, length = self.stored_shape() or (32, 2048)
        return self.samples or samples, self.sequence_length or length


class Speed(Section):
    """Generation speed of the dense and the pruned model, measured alternately where both fit in memory."""

    batch_size: int = Field(1, gt=0, description="Prompts in a batch.")
    prompt_tokens: int = Field(64, gt=0, description="Tokens of each prompt.")
    new_tokens: int = Field(32, gt=1, description="Tokens generated after each prompt.")
    repeats: int = Field(3, gt=0, description="Timed pairs; the median is reported.")


class Generation(Section):
    """Greedy continuation of held-out text, checked for loops, early ends and empty answers."""

    samples: int = Field(
        16, gt=0, description="Number of prompts, each the beginning of a window of evaluation.perplexity."
    )
    prompt_tokens: int = Field(32, gt=0, description="Tokens of each prompt.")
    new_tokens: int = Field(64, gt=7, description="Maximum tokens generated after each prompt.")
    batch_size: int = Field(8, gt=0, description="Prompts in a batch.")


class Backend(Section):
    """An lm-eval backend that runs the tasks in a separate process."""

    name: str = Field(min_length=1, description="lm-eval's name of the backend, such as vllm or local-completions.")
    args: dict[str, Argument] = Field(
        {},
        description="Arguments of the backend. {model} in a text is replaced by the model's folder or hub id; "
        "without model, pretrained or base_url, pretrained is set to it.",
    )
    dense: dict[str, Argument] = Field({}, description="Arguments for the dense model alone, such as its base_url.")
    pruned: dict[str, Argument] = Field({}, description="Arguments for the pruned model alone.")


class Gate(Section):
    """The retention that the pruned model must reach; otherwise the run ends with exit code 3."""

    min_retention: Bar = Field(
        description="Minimum mean over tasks of pruned metric / dense metric; the interval's lower end must reach it."
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="Confidence level of the two-sided interval.")
    per_task: dict[str, Bar] = Field({}, description="Minimum retention of single tasks or groups, by name.")


class Evaluation(Section):
    """Measurements of the dense and of the pruned model, with the same settings."""

    perplexity: Perplexity | None = Field(None, description="Held-out text for perplexity.")
    generation: Generation | None = Field(None, description="Check of greedy generation; needs perplexity's text.")
    tasks: tuple[str, ...] = Field((), strict=False, description="lm-eval task or group names.")
    metrics: dict[str, str] = Field(
        {}, description="Metric by task, such as acc_norm or exact_match,strict-match; default: the task's first."
    )
    include_path: str | None = Field(None, description="Folder of more lm-eval task files; they may run code.")
    limit: int | None = Field(None, gt=0, description="Maximum samples per task; null: all.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null: the task's own.")
    batch_size: int = Field(8, gt=0, description="Requests in a batch.")
    seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the few-shot choice; null: lm-eval's own.")
    backend: Backend | None = Field(None, description="lm-eval backend for the tasks; null: the model in memory.")
    speed: Speed | None = Field(None, description="Generation speed.")
    gate: Gate | None = Field(None, description="Required retention, which decides the exit code.")

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} named twice; name each task once")
        return tasks

    @model_validator(mode="after")
    def _generation_has_text(self) -> Self:
        if self.generation and not self.perplexity:
            raise ValueError(
                "generation continues the held-out text of perplexity; add that section, or remove generation"
            )
        return self
