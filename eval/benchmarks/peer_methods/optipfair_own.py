"""optipfair's data-driven pruning of gated MLPs, by its own code.

Needs ``pip install optipfair`` (0.4.2). It scores neurons by the range of their weights times the norm of their
activations, and runs the model over the calibration windows itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import Peer


class Optipfair(Peer):
    """Neurons by weights and activations, without repair."""

    removes = "neurons"

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the neurons of the lowest score."""
        from optipfair import prune_model  # heavy, and only where this peer runs

        batches = [
            {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)} for ids_BL in torch.split(windows_NL, 4)
        ]
        percent = 100 * amount / model.config.intermediate_size
        prune_model(model, pruning_percentage=percent, dataloader=batches, show_progress=False)
        return []
