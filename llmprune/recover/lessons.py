"""The windows that a process trains on, and the loss of a model on them.

Shapes: S steps, W windows of a step, N windows, B batch, L sequence length, V vocabulary, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.common.distributed import rank, world_size
from llmprune.recover.loss import Targets, distillation_loss
from llmprune.recover.teacher import StoredPredictions


@dataclass(frozen=True)
class Lessons:
    """Windows that this process trains on, and their targets.

    ``windows_NL``: token ids; ``order_SW``: its windows of each step; ``predictions``: the dense model's for the
    windows, None to train on the text alone; ``temperature``: of these.
    """

    windows_NL: Tensor
    order_SW: Tensor
    predictions: StoredPredictions | None
    temperature: float = 1.0

    def mean_loss(self, logits_BLV: Tensor, rows_B: Tensor) -> Tensor:
        """Return the mean loss of some windows in nats per token. Its gradient takes the memory of the logits."""
        device = logits_BLV.device
        if self.predictions is None:
            following_T = self.windows_NL[rows_B][:, 1:].flatten()
            return distillation_loss(logits_BLV[:, :-1].flatten(0, 1), Targets.of_text(following_T.to(device))).mean()
        parts = zip(*(self.predictions.targets(row) for row in rows_B.tolist()), strict=True)
        targets = Targets(*(torch.cat(part).to(device) for part in parts))
        return distillation_loss(logits_BLV.flatten(0, 1), targets, temperature=self.temperature).mean()


def windows_of_this_process(windows_NL: Tensor, order_SW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows that this process trains on, and their order: every ``world_size``-th of each step."""
    own_SW = order_SW[:, rank() :: world_size()]
    rows_N, own_order = torch.unique(own_SW, return_inverse=True)
    return windows_NL[rows_N], own_order.view(own_SW.shape)
