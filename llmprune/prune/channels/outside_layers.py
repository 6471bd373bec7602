"""Repair what follows the last layer after residual channels were cut: the final norm, and a head of its own.

The norm is scaled; the head reads the narrow hidden states through a map M, as the readers of a
layer do (``narrow_stream``). A head tied to the embeddings keeps their kept channels.

Shapes: B batch, L sequence length, D hidden size, K residual channels kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.residual_channels import mix_inputs, norms_of, readers_of, scaled_norm
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.head_inputs import head_inputs
from llmprune.prune.channels.narrow_stream import NarrowStream
from llmprune.prune.channels.norm_scale import NormScale


@torch.no_grad()
def repair_outside(stream: NarrowStream, wide: LayerwiseForward) -> None:
    """Repair the final norm and the head of the narrow model; hidden states are those after the last layer."""
    narrow, outside = stream.forward, stream.hidden.outside
    norms, readers = norms_of(outside), readers_of(outside)
    modules = {name: narrow.decoder.skeleton.get_submodule(name) for name in norms}
    scales = {name: NormScale(module, stream.keep_K) for name, module in modules.items()}
    with _seen_by(scales, wide):
        for _ in head_inputs(wide):
            pass
    for name, scale in scales.items():
        weight = tensor_of(narrow.decoder.skeleton, norms[name].name)
        weight.data = scaled_norm(weight.data, norms[name], factor=scale.factor())
    head = _head(narrow)
    if head not in readers:
        return
    both = zip(range(len(wide.batches)), head_inputs(narrow), head_inputs(wide), strict=True)
    mixing_DK = stream.solve_map(both, where="the head's inputs")
    for one in readers[head]:
        value = mix_inputs(tensor_of(wide.decoder.skeleton, one.name), one.dim, mixing_DK=mixing_DK)
        tensor_of(narrow.decoder.skeleton, one.name).data = value


@contextmanager
def _seen_by(scales: Mapping[str, NormScale], forward: LayerwiseForward) -> Iterator[None]:
    """Let ``scales`` see the norms of this name."""
    with ExitStack() as hooks:
        for name, scale in scales.items():
            handle = forward.decoder.skeleton.get_submodule(name).register_forward_hook(scale.see)
            hooks.callback(handle.remove)
        yield


def _head(forward: LayerwiseForward) -> str:
    head: nn.Module = forward.decoder.skeleton.get_output_embeddings()
    path: str = next(path for path, module in forward.decoder.skeleton.named_modules() if module is head)
    return path
