"""Values that scoring takes: criteria, calibration windows, and how many layers are to be removed.

Shapes: N windows, L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from torch import Tensor

from llmprune.common.distributed import windows_of_process
from llmprune.criteria.base import DepthCriterion, ExpertCriterion, WidthCriterion
from llmprune.criteria.combine import Combine
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.score.source_parts import SourceParts

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringCriteria:
    """Criteria of layers, MLP neurons (``width``), key-value groups (``heads``) and experts; None: not scored.

    ``hidden``: residual channels are scored, by what the layers read of them. ``merges_experts``: the distances between
    experts are measured too.
    """

    depth: DepthCriterion | None = None
    width: WidthCriterion | None = None
    heads: WidthCriterion | None = None
    experts: ExpertCriterion | None = None
    hidden: bool = False
    merges_experts: bool = False

    @property
    def in_forward(self) -> ScoringCriteria:
        """Those that score in the forward pass."""
        width, heads = (one and one.forward_criterion for one in (self.width, self.heads))
        return replace(self, width=width, heads=heads)

    @property
    def in_backward(self) -> ScoringCriteria:
        """Those that score in the backward pass; none where nothing needs gradients."""
        width, heads = (one if one and one.needs_gradients else None for one in (self.width, self.heads))
        return ScoringCriteria(width=width, heads=heads)

    @property
    def requires_gradients(self) -> WidthCriterion | None:
        """The criterion that does not score without gradients."""
        return next((one for one in (self.width, self.heads) if one and one.forward_criterion is None), None)

    def windows_for_gradients(self, windows: int, generated: int) -> int:
        """Return the number of calibration windows that have a backward pass.

        ``windows``: all of them; ``generated``: those that the dense model writes itself.
        """
        return max(one.windows_for_gradients(windows, generated) if one else 0 for one in (self.width, self.heads))

    def for_tokens(self, tokens: int) -> ScoringCriteria:
        """Return the criteria for a number of calibration tokens."""
        width, heads = (one and one.for_tokens(tokens) for one in (self.width, self.heads))
        return replace(self, width=width, heads=heads)

    def __bool__(self) -> bool:
        """Return True where anything is scored."""
        return any((self.depth, self.width, self.heads, self.experts, self.hidden))


class RunOnBatches(Protocol):
    """Runs work on batches of some windows, and again with half the batch where a device runs out of memory."""

    def __call__(self, work: Callable[[CalibrationBatches], T], /) -> T:
        """Return the result of the work. Raises DeviceMemoryError where a single window does not fit."""


@dataclass(frozen=True)
class CalibrationBatches:
    """Calibration windows int64 [N, L], the same in every process, and how they are passed through a model.

    ``batch_size``: windows a forward call. ``store``: where hidden states are kept. ``begin``: the begin-of-text ids,
    whose prediction counts in no loss. ``sources_N``: the source of each window, where scores are summed by source and
    then combined by ``combine``; None: all windows together. Where they are pooled, each source has the same weight.
    ``gradients``: runs the backward pass on windows of its own; None: it is that of all windows. ``first_target``:
    position of a window from which on tokens count in losses.
    """

    windows_NL: Tensor
    batch_size: int
    store: HiddenStateStore = field(default_factory=HiddenStateStore)
    begin: tuple[int, ...] = ()
    sources_N: Tensor | None = None
    combine: Combine = "pooled"
    gradients: RunOnBatches | None = None
    first_target: int = 1

    @property
    def is_pooled(self) -> bool:
        """True where the sums of several sources are added up before scores are made of them."""
        return self.sources_N is not None and self.combine == "pooled"

    @property
    def tokens_of_smallest_source(self) -> int:
        """Number of tokens of the smallest source; of all windows where sources are not told apart."""
        windows = len(self.windows_NL) if self.sources_N is None else int(self.sources_N.bincount().min())
        return windows * self.windows_NL.shape[1]

    def parts(self, forward: LayerwiseForward) -> SourceParts:
        """Return the parts by source of the batches of a forward pass over the windows."""
        return SourceParts(forward, self.sources_N, batch_size=self.batch_size, is_pooled=self.is_pooled)

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
            first_target=self.first_target,
        )


@dataclass(frozen=True)
class DepthTarget:
    """Number of layers to remove; ``keep_pattern``: only so that the kinds of layers repeat as in the base model."""

    remove: int = 1
    keep_pattern: bool = False
