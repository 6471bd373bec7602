"""Results of the training after the cut, and scores before and after it."""

from __future__ import annotations

from statistics import fmean

from llmprune.results.figures.base import Figures
from llmprune.results.figures.calibration import CalibrationSource
from llmprune.results.figures.evaluation import Interval


class RecoveryCheck(Figures):
    """Measurement on held-out windows during the training, by name of their source."""

    step: int  # 0: before the training
    tokens: int  # trained on until then
    loss: float | None  # mean training loss since the check before, in nats per token; None at step 0
    divergence: dict[str, float]  # KL(dense ‖ pruned) in nats per token
    perplexity: dict[str, float]
    kept: bool  # the best so far

    @property
    def mean_divergence(self) -> float:
        """Mean divergence over the sources, in nats per token."""
        return fmean(self.divergence.values())


class RecoveryFigures(Figures):
    """Training after the cut."""

    against: str | None = None  # the dense model, where it is another than the model that was pruned
    method: str
    loss: str
    steps: int
    tokens: int  # trained on, those of repeated windows included
    batch_tokens: int
    learning_rate: float  # the highest
    sources: tuple[CalibrationSource, ...]  # trained on
    generated: int = 0  # windows that the dense model wrote, those that were held out included
    dense_perplexity: dict[str, float]  # of the dense model on the held-out windows, by source
    checks: tuple[RecoveryCheck, ...]  # the first is of step 0
    best_step: int  # whose weights were saved; 0: the repaired weights
    seconds: float  # of the training itself
    kilowatt_hours: float | None = None  # of the GPUs, or else the CPUs, as measured; None where they have no meter
    setbacks: int = 0  # returns to the last good weights, with half the learning rate
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> RecoveryCheck:
        """Check of the repaired weights, before the training."""
        return self.checks[0]

    @property
    def saved(self) -> RecoveryCheck:
        """Check of the weights that were saved."""
        return next(check for check in self.checks if check.step == self.best_step)

    @property
    def worse(self) -> tuple[str, ...]:
        """Sources on which the saved weights are further from the dense model than before the training."""
        before, after = self.before.divergence, self.saved.divergence
        return tuple(name for name, value in after.items() if value > before[name])


class RecoveryScore(Figures):
    """Scores of a task, or a group of tasks, on the same samples: dense, before and after the training."""

    task: str
    metric: str
    higher_is_better: bool = True
    dense: float
    before: float  # of the repaired model
    after: float  # of the trained model
    retention_before: float | None  # before / dense, inverted if lower is better; None if the divisor is 0
    retention_before_interval: Interval | None
    gain: float | None  # after / before, inverted if lower is better; None if the divisor is 0
    gain_interval: Interval | None  # of the pairs of answers before and after
    lost: int | None  # samples right before and wrong after; None if the metric of a sample is not 0 or 1
    gained: int | None  # samples wrong before and right after
    p_value: float | None = None  # McNemar's exact test; None if the metric of a sample is not 0 or 1
    samples: int


class MeanScore(Figures):
    """Mean of a ratio over tasks, with its interval; groups count as in the mean retention."""

    ratio: float
    interval: Interval


class RecoveryScores(Figures):
    """Scores before and after the training, with ``evaluation: {before_recovery: true}``."""

    scores: tuple[RecoveryScore, ...]  # of groups, then of tasks
    retention_before: MeanScore | None  # before / dense; None where no task has an interval
    gain: MeanScore | None  # after / before
