"""Base class of the criteria that score layers by ablation: by what the model predicts without them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from llmprune.common.errors import CalibrationError
from llmprune.criteria.base import AblationCost, DepthCriterion, ScoringSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AblationRefit:
    """Refit of the layer before an ablated one: calibration windows that it is solved on, and its ridge."""

    windows: int
    ridge: float


class AblationCriterion(DepthCriterion):
    """Scores layers by what the model predicts without them, on some of the calibration windows."""

    in_pass1: ClassVar[bool] = False

    windows: int = Field(8, gt=0, description="Calibration windows that models without a layer are evaluated on.")
    greedy: bool = Field(
        True,
        description="Remove layers one by one and score the others anew after each; false: score every layer once.",
    )
    candidates: int | None = Field(
        None, gt=0, description="Layers scored anew in each round: the cheapest of the first round; null: all."
    )
    tokens: int | None = Field(
        None,
        gt=1,
        description="Tokens of each of these windows, from its beginning, of which the last quarter is predicted; "
        "null: whole windows, of which every token is.",
    )

    @property
    def refit(self) -> AblationRefit | None:
        """Refit of the layer before each ablated layer; None: the others stay unchanged."""
        return None

    def horizon(self, remove: int) -> int:
        """Return the number of removed layers that the scores depend on."""
        return remove if self.greedy or self.judges_spans(remove) else 1

    def rounds(self, remove: int) -> int:
        """Return the number of rounds, in each of which the remaining candidates are ablated in turn."""
        return remove if self.greedy else 1

    def judges_spans(self, remove: int) -> bool:
        """Return True where all spans of ``remove`` consecutive layers are judged too, each removed together."""
        return False

    def scaled(self, part: int, whole: int) -> Self:
        """Return the criterion with as large a share of ``part`` windows as it has of ``whole``."""
        return self.model_copy(update={"windows": scaled(self.windows, part, whole=whole)})

    def require_sources(self, windows: Sequence[int]) -> None:
        """Raise CalibrationError where the windows that models are evaluated on lack a source.

        They are evenly spaced over all windows, of which those of a source are together.
        """
        judged = set(evenly_spaced(min(self.windows, sum(windows)), sum(windows)))
        missing = sum(judged.isdisjoint(range(*ends)) for ends in pairwise([0, *accumulate(windows)]))
        if missing:
            raise CalibrationError(
                f"depth.criterion evaluates on {len(judged)} of {sum(windows)} calibration windows, which have none of "
                f"{missing} of its {len(windows)} sources; raise depth.criterion.windows, or set calibration.combine "
                "to pooled"
            )

    def hidden_state_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of the hidden states of all ablated models, which advance together."""
        tokens = min(self.windows, size.samples) * self.judged_length(size.length)
        return (size.layers + 2) * tokens * size.window_bytes // size.length

    def ablation_cost(self, layers: int, *, remove: int, windows: int, length: int) -> AblationCost:
        """Return the time that the rounds take.

        A model without a layer shares what comes before that layer, on average half of the passes.
        """
        judged, own, rounds = min(self.windows, windows), self.judged_length(length), self.rounds(remove)
        ablated = [self.ablated(layers - done, is_first=not done) for done in range(rounds)]
        passes = sum(number / 2 + 1 for number in ablated)
        if self.judges_spans(remove):
            rounds += 2  # the second is of the whole model, for what the layers turn
            ablated.append(layers - remove + 2)  # all spans, and the layers with the lowest scores
            passes += spans_passes(layers, remove=remove)
        return AblationCost(
            rounds,
            judged,
            own,
            predicted=own - first_predicted(own, is_short=self.tokens is not None),
            models=sum(number + 1 for number in ablated),
            forward_passes=passes * judged * own / (windows * length),
        )

    def judged_length(self, length: int) -> int:
        """Return the tokens of each of them, of windows of ``length`` tokens."""
        return length if self.tokens is None else min(self.tokens, length)

    def ablated(self, kept: int, *, is_first: bool) -> int:
        """Return the number of layers that are ablated in a round with ``kept`` layers."""
        return kept if is_first or self.candidates is None else min(self.candidates, kept)

    @abstractmethod
    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the cost of the prediction of each token in ``targets_BP``, float32 [B, P].

        ``dense_BPV``: the dense model's logits.
        """


def first_predicted(length: int, *, is_short: bool) -> int:
    """Return the position of the first token that is predicted in a window of ``length`` tokens.

    ``is_short``: the window was cut short, and all before its last quarter is context.
    """
    return min(length - length // 4, length - 1) if is_short else 1


def spans_passes(layers: int, *, remove: int) -> float:
    """Return the forward passes of a round that judges all spans of ``remove`` layers, and as many others.

    A model without a span shares what comes before it, on average half of its passes. The whole model is passed through
    again for what the layers turn.
    """
    left = layers - remove
    return left * (left + 1) / (2 * layers) + left / layers + 2


def evenly_spaced(number: int, samples: int) -> list[int]:
    """Return the indices of ``number`` of the samples, evenly spaced."""
    return [index * samples // number for index in range(number)]


def scaled(windows: int, part: int, *, whole: int) -> int:
    """Return as large a share of ``part`` windows as ``windows`` are of ``whole``; at least 1."""
    return max(1, windows * part // whole)
