"""A model without some layers compared with the dense model that skips these layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune import ModelError
from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.layer_equivalence import check_layer_equivalence
from llmprune.anatomy.meta_model import build_meta_model, find_layers


def compare_with_skipping(model: PreTrainedModel, ids_BL: torch.Tensor) -> str:
    """Differences between a model without some layers and the dense model that skips them; empty if none."""
    path, layers = find_layers(model)
    count = len(layers)
    generator = random.Random(0)
    removals = [*({index} for index in range(count)), set(generator.sample(range(count), count // 2))]
    dense = build_meta_model(model.config)
    for removed in removals:
        keep = [index for index in range(count) if index not in removed]
        try:
            config = edit_config(model.config, keep, widths={})
            pruned = build_meta_model(config, torch.float32)
            check_layer_equivalence(dense, pruned, keep=keep, changing=set())
        except ModelError:  # refused: nothing is saved
            continue
        renamed = {f"{path}.{old}.": f"{path}.{new}." for new, old in enumerate(keep)}
        tensors = {}
        for name, tensor in model.state_dict().items():
            prefix = next((old for old in renamed if name.startswith(old)), "")
            if prefix or not name.startswith(f"{path}."):
                tensors[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
        pruned.load_state_dict(tensors, strict=False, assign=True)
        pruned.tie_weights()
        with torch.no_grad(), skipped(layers, removed):
            expected = model(input_ids=ids_BL, use_cache=False).logits
        with torch.no_grad():
            difference = (pruned(input_ids=ids_BL, use_cache=False).logits - expected).abs().max().item()
        if not difference <= 1e-4 * expected.abs().max().item():
            return f"without layers {sorted(removed)} the logits differ by {difference:.2g} from skipping these layers"
    return ""


@contextmanager
def skipped(layers: torch.nn.ModuleList, indices: set[int]) -> Iterator[None]:
    """Let these layers pass their hidden states through."""

    def passing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            output = forward(*args, **kwargs)
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return call

    for index in indices:
        layers[index].forward = passing(layers[index].forward)
    try:
        yield
    finally:
        for index in indices:
            del layers[index].forward
