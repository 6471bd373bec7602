"""Arguments with which the decoder calls its layers, to run layers one by one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def layer_keywords(model: PreTrainedModel, ids_1L: Tensor) -> list[dict[str, Any]]:
    """Return each layer's keyword arguments for one window; they broadcast over batches of windows as long."""
    calls: list[dict[str, Any]] = []

    def keep(_module: Any, _inputs: Any, keywords: dict[str, Any]) -> None:
        calls.append(keywords)

    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
        model.model(input_ids=ids_1L, use_cache=False)
    return calls
