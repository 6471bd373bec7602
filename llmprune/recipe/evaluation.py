"""The recipe's ``evaluation`` section: measurements of the dense and of the pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmprune.common.errors import did_you_mean
from llmprune.common.schema import Positive, Section
from llmprune.recipe.calibration import TokenWindows
from llmprune.recipe.repository_names import RepositoryName
from llmprune.recipe.suites import suites

Bar = Annotated[float, Field(gt=0, le=1)]
Argument = str | int | float | bool
LIMIT = "evaluation.limit"


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
    """Greedy answers of both models to the same prompts: agreement, loops, early ends and empty answers."""

    prompts: Literal["auto", "held_out", "questions"] = Field(
        "auto",
        description="held_out: beginnings of the windows of evaluation.perplexity; questions: llmprune's own, through "
        "the chat template where the tokenizer has one; auto: questions where it has one, otherwise held_out if these "
        "windows suffice, else questions.",
    )
    samples: int = Field(32, gt=0, description="Number of prompts; of questions at most 64.")
    prompt_tokens: int = Field(32, gt=0, description="Tokens of each prompt from held-out text.")
    new_tokens: int = Field(64, gt=7, description="Maximum tokens generated after each prompt.")
    batch_size: int = Field(16, gt=0, description="Prompts in a batch.")


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

    @property
    def serves_elsewhere(self) -> bool:
        """True if the models are behind an address, possibly on the GPUs of this machine."""
        return any("base_url" in given for given in (self.args, self.dense, self.pruned))


class Gate(Section):
    """The quality that the pruned model must reach; otherwise the run ends with exit code 3."""

    min_retention: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Minimum mean over tasks of pruned metric / dense metric; the interval's lower end must reach it.",
    )
    min_greedy_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Minimum share of the tokens of the dense model's greedy answers that the pruned model also ranks "
        "first; the interval's lower end must reach it.",
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="Confidence level of the two-sided interval.")
    per_task: dict[str, Bar] = Field({}, description="Minimum retention of single tasks or groups, by name.")

    @property
    def needs_tasks(self) -> bool:
        """True if a bar is about the retention of tasks."""
        return self.min_retention is not None or bool(self.per_task)

    @model_validator(mode="after")
    def _has_a_bar(self) -> Self:
        if not self.needs_tasks and self.min_greedy_agreement is None:
            raise ValueError("a gate needs a bar: min_retention, min_greedy_agreement or per_task")
        return self


def _settings_or_false(value: Any) -> Any:
    if value is True:
        raise ValueError("leave generation out for the default, give settings such as {samples: 48}, or write false")
    return None if value is False else value


class Evaluation(Section):
    """Measurements of the dense and of the pruned model, with the same settings."""

    perplexity: Perplexity | None = Field(None, description="Held-out text for perplexity.")
    generation: Annotated[Generation | None, BeforeValidator(_settings_or_false)] = Field(
        Generation(), description="Greedy answers of both models, which every run compares; false: none."
    )
    against: RepositoryName | None = Field(
        None,
        description="Hub id or folder of the dense model that scores, perplexity and answers are compared with, where "
        "`model` is already pruned; first_base: the hub model that it was first pruned from, by llmprune's record in "
        "its folder or repository. Left out: `recover.against`, else `model` itself. A training learns from it too.",
    )
    against_revision: str = Field("main", description="Branch, tag or commit of the hub model `against`.")
    suite: str | None = Field(
        None,
        description="Set of lm-eval tasks with limits: mathematics, chat, or general, which takes about an hour on one "
        "GPU for a model of 8 B parameters. `tasks` are evaluated besides.",
    )
    tasks: tuple[str, ...] = Field((), strict=False, description="lm-eval task or group names.")
    metrics: dict[str, str] = Field(
        {}, description="Metric by task, such as acc_norm or exact_match,strict-match; default: the task's first."
    )
    include_path: str | None = Field(None, description="Folder of more lm-eval task files; they may run code.")
    limit: Positive | dict[str, Positive] | None = Field(
        None,
        description="Maximum samples per task: a number for all, or numbers by task or group, such as {gsm8k: 400}; "
        "for others, and with null: the suite's own limits, else all.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null: the task's own.")
    batch_size: int = Field(8, gt=0, description="Requests in a batch.")
    seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the few-shot choice; null: lm-eval's own.")
    backend: Backend | None = Field(None, description="lm-eval backend for the tasks; null: the model in memory.")
    speed: Speed | None = Field(None, description="Generation speed.")
    before_recovery: bool = Field(
        False,
        description="Also evaluate the model from before the training of `recover`, on the tasks and the text of "
        "perplexity; scores before and after are compared by document.",
    )
    gate: Gate | None = Field(None, description="Required quality, which decides the exit code.")

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} named twice; name each task once")
        return tasks

    @field_validator("suite")
    @classmethod
    def _known(cls, suite: str | None) -> str | None:
        if suite is not None and suite not in suites():
            near = did_you_mean(suite, list(suites()))
            raise ValueError(f"there is no suite {suite!r}{near}; there is: {', '.join(suites())}")
        return suite

    @model_validator(mode="after")
    def _limits_of_own_tasks(self) -> Self:
        others = sorted(self.limit.keys() - set(self.task_names)) if isinstance(self.limit, dict) else []
        if others:
            raise ValueError(
                f"limit names {', '.join(others)}, which the recipe does not evaluate; it evaluates: "
                f"{', '.join(self.task_names) or 'no task'}"
            )
        return self

    @model_validator(mode="after")
    def _generation_has_text(self) -> Self:
        if self.generation and self.generation.prompts == "held_out" and not self.perplexity:
            raise ValueError(
                "generation.prompts: held_out continues the held-out text of perplexity; add that section, or choose "
                "questions"
            )
        if self.gate and self.gate.min_greedy_agreement is not None and self.generation is None:
            raise ValueError("gate.min_greedy_agreement is measured by generation; do not set that to false")
        return self

    @model_validator(mode="after")
    def _loads_before_recovery(self) -> Self:
        if self.before_recovery and self.backend and self.backend.serves_elsewhere:
            raise ValueError(
                "before_recovery needs a backend that loads the model from its folder; this one asks base_url, where "
                "only dense and pruned are served"
            )
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of all tasks and groups: the suite's, then the others."""
        return tuple(dict.fromkeys((*self._suite_limits, *self.tasks)))

    def limit_of(self, name: str) -> int | None:
        """Return the maximum number of samples of a task, or of each task of a group; None: all."""
        return self.limit if isinstance(self.limit, int) else (self._suite_limits | (self.limit or {})).get(name)

    @property
    def limits(self) -> dict[str, int | None]:
        """Maximum number of samples by the name of a task or group; None: all."""
        return {name: self.limit_of(name) for name in self.task_names}

    @property
    def requires_generation(self) -> bool:
        """True if the recipe asks for generation itself: then it is an error if it cannot be measured."""
        asked = "generation" in self.model_fields_set or (self.gate and self.gate.min_greedy_agreement is not None)
        return self.generation is not None and bool(asked)

    @property
    def _suite_limits(self) -> dict[str, int]:
        return suites()[self.suite] if self.suite else {}


def recorded_tasks(recorded: Mapping[str, Any]) -> Evaluation:
    """Return the tasks and limits of an evaluation section in a report."""
    return Evaluation.model_validate(
        {name: recorded[name] for name in ("suite", "tasks", "limit") if name in recorded}, strict=False
    )


def limit_override(limit: int | Mapping[str, int] | None) -> str:
    """Return the override of ``evaluation.limit``, as for ``--set``."""
    if isinstance(limit, Mapping):
        return f"{LIMIT}={{{', '.join(f'{name}: {number}' for name, number in limit.items())}}}"
    return f"{LIMIT}={'null' if limit is None else limit}"
