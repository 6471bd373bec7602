"""Results of the training after the cut."""

from __future__ import annotations

from llmprune.results.calibration_sources import CalibrationSource
from llmprune.results.figures import Figures


class RecoveryCheck(Figures):
    """Measurement on held-out windows during the training, by name of their source."""

    step: int  # 0: before the training
    tokens: int  # trained on until then
    loss: float | None  # mean training loss since the check before, in nats per token; None at step 0
    divergence: dict[str, float]  # KL(dense ‖ pruned) in nats per token
    perplexity: dict[str, float]
    kept: bool  # the best so far


class RecoveryFigures(Figures):
    """Training after the cut."""

    method: str
    loss: str
    steps: int
    tokens: int  # trained on, those of repeated windows included
    batch_tokens: int
    learning_rate: float  # the highest
    sources: tuple[CalibrationSource, ...]  # trained on
    dense_perplexity: dict[str, float]  # of the dense model on the held-out windows, by source
    checks: tuple[RecoveryCheck, ...]
    best_step: int  # whose weights were saved; 0: the repaired weights
    seconds: float  # of the training itself
    kilowatt_hours: float | None = None  # estimate; None where the device reports no power limit
    setbacks: int = 0  # returns to the last good weights, with half the learning rate
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> tuple[str, ...]:
        """Sources on which the saved weights are further from the dense model than before the training."""
        best = next(check for check in self.checks if check.step == self.best_step)
        return tuple(name for name, value in best.divergence.items() if value > self.checks[0].divergence[name])
