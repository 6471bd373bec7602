"""Values that scoring takes: criteria, calibration windows, and how many layers are to be removed.

Shapes: N windows, L sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from llmprune.common.distributed import windows_of_process
from llmprune.criteria.base import DepthCriterion, ExpertCriterion, WidthCriterion
from llmprune.criteria.combine import Combine
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStateStore


@dataclass(frozen=True)
class ScoringCriteria:
    """Criteria of layers, MLP neurons (``width``), key-value groups (``heads``) and experts; None: not scored."""

    depth: DepthCriterion | None = None
    width: WidthCriterion | None = None
    heads: WidthCriterion | None = None
    experts: ExpertCriterion | None = None

    @property
    def by_gradients(self) -> WidthCriterion | None:
        """Criterion of neurons and key-value groups, where it needs a backward pass."""
        criterion = self.width or self.heads
        return criterion if criterion and criterion.needs_gradients else None

    def for_tokens(self, tokens: int) -> ScoringCriteria:
        """Return the criteria for so many calibration tokens."""
        width, heads = (one and one.for_tokens(tokens) for one in (self.width, self.heads))
        return replace(self, width=width, heads=heads)

    def __bool__(self) -> bool:
        """Return True where anything is scored."""
        return any((self.depth, self.width, self.heads, self.experts))


@dataclass(frozen=True)
class CalibrationBatches:
    """Calibration windows int64 [N, L], the same in every process, and how they are passed through a model.

    ``batch_size``: windows a forward call. ``store``: where hidden states are kept. ``begin``: the begin-of-text ids,
    whose prediction counts in no loss. ``sources_N``: the source of each window, where scores are summed by source and
    then combined by ``combine``; None: all windows together.
    """

    windows_NL: Tensor
    batch_size: int
    store: HiddenStateStore = field(default_factory=HiddenStateStore)
    begin: tuple[int, ...] = ()
    sources_N: Tensor | None = None
    combine: Combine = "pooled"

    @property
    def tokens_of_smallest_source(self) -> int:
        """Number of tokens of the smallest source; of all windows where sources are not told apart."""
        windows = len(self.windows_NL) if self.sources_N is None else int(self.sources_N.bincount().min())
        return windows * self.windows_NL.shape[1]

    def at(self, numbers_N: Tensor) -> CalibrationBatches:
        """Return the batches of some of the windows, by their numbers."""
        sources_N = None if self.sources_N is None else self.sources_N[numbers_N]
        return replace(self, windows_NL=self.windows_NL[numbers_N], sources_N=sources_N)

    def forward(self, decoder: Decoder) -> LayerwiseForward:
        """Begin a layer-wise forward pass over this process's share of the windows."""
        return LayerwiseForward(
            decoder,
            windows_of_process(self.windows_NL),
            batch_size=self.batch_size,
            store=self.store,
            begin=self.begin,
        )


@dataclass(frozen=True)
class DepthTarget:
    """Number of layers to remove; ``keep_pattern``: only so that the kinds of layers repeat as in the base model."""

    remove: int = 1
    keep_pattern: bool = False
