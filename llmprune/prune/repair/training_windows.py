"""Windows that a layer is trained on, and those that judge the training.

Shapes: N windows of all processes, S some of them, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.common.distributed import rank, world_size
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.layer_calls import LayerCall
from llmprune.prune.repair.folds import Folds
from llmprune.recipe.refit import WINDOWS_OF_STEP


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of the training of layers, for all layers.

    ``calls[n][i]``: arguments of layer i for the n-th window of this process alone. ``folds``: of the windows of all
    processes. ``batch_size``: of the hidden states. ``seed``: of the order of the steps.
    """

    calls: list[list[LayerCall]]
    folds: Folds
    batch_size: int
    seed: int

    def of_layer(self, new: int) -> LayerWindows:
        """Return the windows of a kept layer."""
        held_out_N = self.folds.judging(new)
        return LayerWindows(
            train_S=(~held_out_N).nonzero().squeeze(1),
            held_out_S=held_out_N.nonzero().squeeze(1),
            weights_N=torch.tensor(self.folds.weights)[self.folds.of_windows_N],
            random=torch.Generator().manual_seed(self.seed + new),
        )

    def hidden_states(self, streams: HiddenStates, window: int, *, device: torch.device) -> Tensor:
        """Return the hidden states [1, L, D] of a window of this process."""
        batch, row = divmod(window // world_size(), self.batch_size)
        return streams[batch][row : row + 1].to(device)

    def call(self, window: int, index: int) -> LayerCall:
        """Return the arguments of a layer for a window of this process."""
        return self.calls[window // world_size()][index]


@dataclass(frozen=True)
class LayerWindows:
    """Windows of the training of one layer, by their number among those of all processes.

    ``train_S``: those that it is trained on; ``held_out_S``: those that judge it. ``weights_N``: of every window in the
    loss. ``random``: draws the order of the steps.
    """

    train_S: Tensor
    held_out_S: Tensor
    weights_N: Tensor
    random: torch.Generator

    @property
    def steps_of_epoch(self) -> int:
        """Number of steps in which every window that is trained on comes once."""
        return -(-len(self.train_S) // _windows_of_step())

    def steps(self) -> Iterator[Tensor]:
        """Yield the windows [S] of each step of an epoch, the same in every process."""
        order_S = torch.randperm(len(self.train_S), generator=self.random)
        yield from torch.split(self.train_S[order_S], _windows_of_step())

    def shares(self, windows_S: Tensor) -> Iterator[tuple[int, float]]:
        """Yield those of some windows that are this process's, and the share of each in their weighted mean."""
        weights_S = self.weights_N[windows_S]
        for window, share in zip(windows_S.tolist(), (weights_S / weights_S.sum()).tolist(), strict=True):
            if window % world_size() == rank():
                yield window, share


def _windows_of_step() -> int:
    return max(WINDOWS_OF_STEP, world_size())
