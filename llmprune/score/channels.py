"""Scores of residual channels: what a layer reads of each, and how much of the stream each is.

    score of channel d = share of d in   Σ over readers of  mean over tokens of n_d² · ‖ column d of the reader ‖²
                       + share of d in   mean over tokens of x_d² / mean(x²)

n: the input of a projection, router or expert that reads the stream; x: the hidden states before the layer, each token
over its root mean square, so that a few tokens with far larger hidden states do not decide. Every layer has the same
say. It is Minitron's importance of embedding channels (arXiv 2407.14679) with the weights of what reads them.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.residual_channels import channels_read, readers_of
from llmprune.anatomy.types import HiddenDim
from llmprune.criteria.accumulators.mean_square import Energy
from llmprune.score.scorer import Scorer
from llmprune.score.scores import Scores
from llmprune.score.source_parts import SourceParts

_STREAM = ""  # the layer itself, whose input is the stream


class ChannelScorer(Scorer):
    """Scores the residual channels by one layer; ``dims``: its tensors with a dimension of channels."""

    def __init__(self, key: str, layer: nn.Module, *, dims: Sequence[HiddenDim], size: int, parts: SourceParts) -> None:
        self.key, self.layer, self.parts = key, layer, parts
        device = next(layer.parameters()).device
        weights = {
            path: torch.stack([_squares(tensor_of(layer, one.name), one.dim) for one in tensors]).sum(0)
            for path, tensors in readers_of(dims).items()
        }
        weights[_STREAM] = torch.ones(size, device=device)
        self.accumulators = {path: [Energy(weight_D) for _ in range(parts.count)] for path, weight_D in weights.items()}

    def watch(self, hooks: ExitStack) -> None:
        """Read the hidden states before the layer, and the inputs of all that reads channels."""
        hooks.enter_context(channels_read(self.layer, self.accumulators, see=self._see))

    def _see(self, path: str, value: Tensor) -> None:
        if path == _STREAM:
            value = value.float() / value.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        for source, (own,) in self.parts.of_running(value):
            self.accumulators[path][source].update(own)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums by each reader and source."""
        return [tensor for own in self.accumulators.values() for one in own for tensor in one.reducible_state()]

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores of the channels."""
        merged = {path: self.parts.merged(own) for path, own in self.accumulators.items()}
        stream = merged.pop(_STREAM)
        for number, one in enumerate(scores):
            read_D = torch.stack([own[number].scores().cpu() for own in merged.values()]).sum(0)
            one.hidden[self.key] = _shares(read_D) + _shares(stream[number].scores().cpu())


def _shares(energy_D: Tensor) -> Tensor:
    return energy_D / energy_D.sum().clamp_min(1e-30)


def _squares(weight: Tensor, dim: int) -> Tensor:
    """Return the sum of the squares of a weight's entries for each channel, float32 [D]."""
    return weight.float().square().sum([other for other in range(weight.ndim) if other != dim])
