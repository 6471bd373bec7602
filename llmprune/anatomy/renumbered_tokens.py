"""A model that reads and predicts some of its tokens under other ids, as one that lost the other tokens does.

Its probabilities are those of the kept tokens alone: softmax over their logits.

Shapes: B batch, L sequence length, V tokens of the model, K tokens kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def renumber_tokens(model: PreTrainedModel, keep_K: Tensor) -> None:
    """Have a model take and predict the tokens ``keep_K``, int64 [K], with the ids 0 to K - 1 in this order.

    Weights and config stay: ids are mapped before the model's forward, and logits [B, L, V] are selected after it, to
    [B, L, K].
    """
    on_device = {keep_K.device: keep_K}

    def kept_on(device: torch.device) -> Tensor:
        if device not in on_device:
            on_device[device] = keep_K.to(device)
        return on_device[device]

    def map_ids(_: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (kept_on(args[0].device)[args[0]], *args[1:]), kwargs
        ids_BL: Tensor = kwargs["input_ids"]
        return args, kwargs | {"input_ids": kept_on(ids_BL.device)[ids_BL]}

    def select_logits(_: PreTrainedModel, __: tuple[Any, ...], output: Any) -> Any:
        output.logits = output.logits.index_select(-1, kept_on(output.logits.device))
        return output

    model.register_forward_pre_hook(map_ids, with_kwargs=True)
    model.register_forward_hook(select_logits)
