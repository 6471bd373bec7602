"""Outcome of each round of cut and training."""

from __future__ import annotations

from llmprune.results.figures.base import Figures
from llmprune.results.figures.model_size import Size


class RoundFigures(Figures):
    """Outcome of one round of cut and training."""

    size: Size
    removed_layers: tuple[int, ...]  # in this round, by their indices in the first dense model
    tokens: int  # trained on
    before: float  # mean held-out divergence of the repaired weights, in nats per token
    after: float  # of the weights that were saved
    seconds: float  # of the training
