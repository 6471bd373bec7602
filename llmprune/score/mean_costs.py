"""Mean cost of a model's predictions by source, from its hidden states after the last layer.

Shapes: S sources, M models, B batch, L sequence length, T predictions of a window, P positions of a chunk, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.common.distributed import sum_over_processes
from llmprune.common.linalg.device_sums import DeviceSums
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.logits import token_chunks
from llmprune.layerwise.window_groups import WindowGroups


@dataclass(frozen=True)
class MeanCosts:
    """Mean costs of predictions on the windows of a forward pass, by their sources.

    ``token_costs(logits_BPV, dense_BPV, targets_BP=…)``: cost of each prediction [B, P]. ``groups``: the sources; None:
    all windows together.
    """

    forward: LayerwiseForward
    token_costs: Callable[..., Tensor]
    groups: WindowGroups | None

    def of(self, models: Sequence[HiddenStates], dense: HiddenStates) -> Tensor:
        """Return the mean cost of a token of each source and model, float64 [S, M].

        ``models``: hidden states after the last layer of each, ``dense`` those of the dense model.
        """
        forward, device, own = self.forward, self.forward.decoder.device, len(models) + 1  # the last counts tokens
        sources = self.groups.count if self.groups else 1
        totals = DeviceSums(sources * own)
        for batch in range(len(forward.batches)):
            ids_BL = forward.token_ids(batch)
            judged = self._judged(batch)
            for chunk in token_chunks(forward, ids_BL):
                parts = [mask_BT if mask_BT is None else mask_BT[chunk.windows, chunk.positions] for mask_BT in judged]
                dense_BPV = chunk.next_token_logits(forward, ids_BL, hidden_BLD=dense.at(batch, device))
                targets_BP = chunk.targets(ids_BL)
                for number, hidden_states in enumerate(models):
                    hidden_BLD = hidden_states.at(batch, device)
                    logits_BPV = chunk.next_token_logits(forward, ids_BL, hidden_BLD=hidden_BLD)
                    costs_BP = self.token_costs(logits_BPV, dense_BPV, targets_BP=targets_BP)
                    for source, mask_BP in enumerate(parts):
                        totals.add(source * own + number, costs_BP if mask_BP is None else costs_BP.where(mask_BP, 0))
                for source, mask_BP in enumerate(parts):
                    if mask_BP is None:
                        totals.count(source * own + len(models), targets_BP.numel())
                    else:
                        totals.add(source * own + len(models), mask_BP)
        (total_N,) = totals.reducible_state()
        sum_over_processes([total_N])
        total_SM = total_N.view(sources, own)
        return (total_SM[:, :-1] / total_SM[:, -1:]).cpu()

    def _judged(self, batch: int) -> list[Tensor | None]:
        """Return for each source the predictions of a batch that count, bool [B, L - 1]; None where all do."""
        device, ids_BL = self.forward.decoder.device, self.forward.batches[batch]
        counted_BT = self.forward.targets.of(batch, device)
        if self.groups is None:
            return [counted_BT]
        if counted_BT is None:
            counted_BT = torch.ones(len(ids_BL), ids_BL.shape[1] - 1, dtype=torch.bool, device=device)
        of_SB = torch.zeros(self.groups.count, len(ids_BL), dtype=torch.bool, device=device)
        for source, (window_R,) in self.groups.parts(batch, torch.arange(len(ids_BL), device=device).unsqueeze(1)):
            of_SB[source].index_fill_(0, window_R, True)
        return list(of_SB[:, :, None] & counted_BT)
