"""Evaluation results of a run: perplexity, tasks, generation, speed and the gate, dense and pruned side by side."""

from __future__ import annotations

from typing import Literal

from llmprune.results.figures.base import Figures

Verdict = Literal["pass", "fail", "not enough samples", "no interval"]


class PerplexityFigures(Figures):
    """Perplexity on held-out text of the dense model, the model after the cut, and the pruned model."""

    dense: float
    cut: float | None  # before the refit; None if nothing was refit, for ``pruned`` is then the cut model
    repaired: float | None = None  # before the training, with ``evaluation: {before_recovery: true}``
    pruned: float
    tokens: int
    source: str
    begin_of_text: str | None = None  # that the windows begin with, as ``<bos> (2)``


class DivergenceFigures(Figures):
    """KL divergence of the pruned model's next-token distributions from the dense model's, on the held-out text."""

    mean: float  # nats per token
    quantiles: dict[str, float]  # by cumulative share of the tokens: 0.5, 0.9, 0.99, 1
    same_first: float  # share of the tokens where both models rank the same token first
    tokens: int


class Interval(Figures):
    """Two-sided confidence interval of a retention; ``confidence``: its level, such as 0.95."""

    low: float
    high: float
    confidence: float


class Example(Figures):
    """Continuations of one prompt by both models."""

    prompt: str
    dense: str
    pruned: str


class TaskFigures(Figures):
    """Scores of both models in one lm-eval task, or in a group of tasks, on the same samples."""

    task: str
    group: str | None = None  # group in the recipe that includes this task
    metric: str
    filter: str = "none"
    higher_is_better: bool = True
    dense: float
    pruned: float
    retention: float | None  # pruned / dense, inverted if lower is better; None if the divisor is 0
    interval: Interval | None = None  # of the retention; None if the metric is not a mean over samples
    samples: int
    documents: int | None = None  # all documents of the task
    lost: int | None  # samples right before and wrong after; None if the metric of a sample is not 0 or 1
    gained: int | None  # samples wrong before and right after
    p_value: float | None = None  # McNemar's exact test; None if the metric of a sample is not 0 or 1
    identical: bool = False  # all answers are bit-equal
    examples: tuple[Example, ...] = ()  # of generative tasks


class RetentionFigures(Figures):
    """Unweighted mean retention over tasks; a group counts once, in place of its tasks."""

    retention: float
    interval: Interval
    counted: tuple[str, ...]  # tasks and groups in the mean
    left_out: tuple[str, ...]  # tasks and groups without an interval
    samples: int


class FreeText(Figures):
    """Text statistics of one model's free generation, as means over the prompts."""

    repetition: float  # share of the tokens that complete a repeated 4-gram
    loops: float  # share of the texts that end in a loop
    empty: float  # share of the texts without a letter or digit
    tokens: float  # length of a text in tokens


class GreedyAnswer(Figures):
    """Greedy answer of a model: token ids before the first end token, and that token (None: the limit was reached)."""

    ids: tuple[int, ...]
    end: int | None

    @property
    def written(self) -> tuple[int, ...]:
        """All token ids of the answer, the end token included."""
        return self.ids if self.end is None else (*self.ids, self.end)


class AnswerAgreement(Figures):
    """Next tokens of the pruned model along one greedy answer of the dense model."""

    same: int  # tokens that the pruned model also ranks first
    tokens: int  # of the answer, its end token included
    first: int  # tokens before the first difference; all tokens if there is none


class AgreementFigures(Figures):
    """Greedy agreement: next tokens of the pruned model along the dense model's greedy answers.

    Intervals are those of prompts drawn as a whole. The tokens before the first difference are at most those of an
    answer, so that their mean and median are lower bounds where many answers have no difference.
    """

    share: float  # of all tokens that the pruned model also ranks first
    interval: Interval
    first_mean: float  # tokens before the first difference
    first_mean_interval: Interval
    first_median: float
    first_median_interval: Interval
    whole: float  # share of the answers without a difference
    tokens: int  # of all answers
    samples: int  # answers


class GenerationFigures(Figures):
    """Free greedy generation of both models after the same prompts; ``text`` is the held-out text's continuation."""

    dense: FreeText
    pruned: FreeText
    text: FreeText | None  # None for prompts that are no held-out text
    agreement: AgreementFigures | None = None  # along the dense model's answers
    source: str = "held-out text"  # of the prompts
    samples: int
    prompt_tokens: int  # of the longest prompt
    new_tokens: int
    examples: tuple[Example, ...]


class SpeedFigures(Figures):
    """Generation speed in tokens per second: medians of runs in one process.

    The speedup shown to people is the ratio of these medians (``formatting.speedup``). It lies between ``ratio_low``
    and ``ratio_high``.
    """

    dense: float
    pruned: float
    ratio: float  # median of pruned / dense over the pairs of runs
    ratio_low: float  # minimum over the pairs
    ratio_high: float  # maximum over the pairs
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    alternating: bool = (
        True  # both models took turns; else all runs of one came first, because both do not fit in memory
    )


class BarFigures(Figures):
    """Bar of the gate: the least retention of the mean, a task or a group, or the least greedy agreement.

    For greedy agreement ``minimum``, ``measured`` and ``interval`` are shares of tokens, and ``samples`` are answers.
    """

    kind: Literal["retention", "greedy agreement"] = "retention"
    name: str  # task or group, "mean", or "greedy agreement"
    minimum: float  # that the interval's lower end must reach
    measured: float | None  # None where it was not measured, or two scores have no ratio
    interval: Interval | None
    verdict: Verdict
    samples: int
    samples_needed: int | None = None  # estimate where samples are too few; None if no feasible number suffices
    reason: str | None = None  # why there is no interval


class GateFigures(Figures):
    """Verdict of the gate over all bars; ``min_retention`` and ``retention`` are those of the mean."""

    min_retention: float | None  # None if the gate has no bar for the mean
    retention: float | None  # None if no task has a retention
    passed: bool
    confidence: float
    verdict: Verdict
    bars: tuple[BarFigures, ...]
