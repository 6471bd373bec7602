"""Interface of a scorer of one part of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from llmprune.score.scores import Scores


class Scorer(ABC):
    """Scores one part of a layer; ``key`` names the part in the scores."""

    key: str

    @abstractmethod
    def watch(self, hooks: ExitStack) -> None:
        """Read the part's activations until the hooks are removed."""

    @abstractmethod
    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves, which several processes add up in place before ``write``."""

    @abstractmethod
    def write(self, scores: Sequence[Scores]) -> None:
        """Write the part's scores by each source from the sums of all processes."""
