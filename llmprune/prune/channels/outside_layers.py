"""Repair what follows the last layer after residual channels were cut: the final norm, and a head of its own.

The norm is scaled; the head reads the narrow hidden states through a map M, as the readers of a
layer do (``narrow_stream``). A head tied to the embeddings keeps their kept channels.

Shapes: B batch, L sequence length, D hidden size, K residual channels kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.residual_channels import mix_inputs, norms_of, readers_of, scaled_norm
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.channels.narrow_stream import NarrowStream
from llmprune.prune.channels.norm_scale import NormScale


@torch.no_grad()
def repair_outside(stream: NarrowStream, wide: LayerwiseForward) -> None:
    """Repair the final norm and the head of the narrow model; hidden states are those after the last layer."""
    narrow, outside = stream.forward, stream.hidden.outside
    norms, readers = norms_of(outside), readers_of(outside)
    modules = {name: narrow.decoder.skeleton.get_submodule(name) for name in norms}
    scales = {name: NormScale(module, stream.keep_K) for name, module in modules.items()}
    for _ in _tails(wide, scales):
        pass
    for name, scale in scales.items():
        weight = tensor_of(narrow.decoder.skeleton, norms[name].name)
        weight.data = scaled_norm(weight.data, norms[name], factor=scale.factor())
    head = _head(narrow)
    if head not in readers:
        return
    inputs = ((one.batch, one.input, two.input) for one, two in zip(_tails(narrow), _tails(wide), strict=True))
    mixing_DK = stream.solve_map(inputs, where="the head's inputs")
    for one in readers[head]:
        value = mix_inputs(tensor_of(wide.decoder.skeleton, one.name), one.dim, mixing_DK=mixing_DK)
        tensor_of(narrow.decoder.skeleton, one.name).data = value


@dataclass
class _Tail:
    """Input [B, L, D] of the head of one batch."""

    batch: int
    seen: list[Tensor] = field(default_factory=list)

    def stop(self, value: Tensor) -> None:
        """Note the input of the head, which is not called."""
        self.seen.append(value)
        raise _ReachedHeadError

    @property
    def input(self) -> Tensor:
        """The input of the head."""
        return self.seen[0]


class _ReachedHeadError(Exception):
    """The head is about to be called."""


def _tails(forward: LayerwiseForward, scales: Mapping[str, NormScale] | None = None) -> Iterator[_Tail]:
    """Yield the input of the head, batch by batch, without the logits; ``scales`` see the norms before it."""
    skeleton = forward.decoder.skeleton
    head = skeleton.get_output_embeddings()
    for batch in range(len(forward.batches)):
        tail = _Tail(batch)
        with ExitStack() as hooks, suppress(_ReachedHeadError):
            for name, scale in (scales or {}).items():
                handle = skeleton.get_submodule(name).register_forward_hook(scale.see)
                hooks.callback(handle.remove)
            hooks.enter_context(inputs_of(head, tail.stop))
            forward.logits(batch)
        yield tail


def _head(forward: LayerwiseForward) -> str:
    head: nn.Module = forward.decoder.skeleton.get_output_embeddings()
    path: str = next(path for path, module in forward.decoder.skeleton.named_modules() if module is head)
    return path
