"""Judge of a search: windows that the scores did not see, on which models are compared with the dense one.

Shapes: N windows, L sequence length, S sources, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.common.progress import track
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.score.inputs import CalibrationBatches
from llmprune.score.mean_costs import MeanCosts


@dataclass(frozen=True)
class Judge:
    """Windows with their sources (``batches.sources_N``), and the dense model whose predictions they are judged by."""

    dense: Decoder
    batches: CalibrationBatches

    def forward(self, decoder: Decoder) -> LayerwiseForward:
        """Begin a layer-wise forward pass of a model over this process's share of the windows."""
        return self.batches.forward(decoder)

    @cached_property
    def _dense(self) -> LayerwiseForward:
        """The dense model after its last layer."""
        forward = self.forward(self.dense)
        for index in track(range(len(self.dense)), "search: dense model"):
            with self.dense.layer(index) as layer:
                forward.pass_through(index, layer)
        return forward

    @torch.no_grad()
    def divergences(self, models: Sequence[HiddenStates]) -> Tensor:
        """Return KL(dense ‖ model) in nats per token, float64 [S, M], of hidden states after the last layers."""
        sources_N, dense = self.batches.sources_N, self._dense
        groups = None if sources_N is None else WindowGroups(sources_N, self.batches.batch_size)
        return MeanCosts(dense, _divergence, groups).of(models, dense.hidden_states)

    def at(self, numbers_N: Tensor) -> Judge:
        """Return the judge with some of the windows, by their numbers; every source must have one of them."""
        return Judge(self.dense, self.batches.at(numbers_N))


def _divergence(logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
    """Return the divergence of the distributions of each next token [B, P]."""
    return kl_divergence(dense_BPV, logits_BPV)
