"""Repair what follows the last layer after residual channels were cut: the final norm, and a head of its own.

The norm is scaled channel by channel; the head reads the narrow hidden states through a map M, as the readers of a
layer do (``narrow_stream``). A head tied to the embeddings keeps their kept channels.

Shapes: B batch, L sequence length, D hidden size, K residual channels kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.residual_channels import mix_inputs, norms_of, readers_of, scaled_norm
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.channels.narrow_stream import NarrowStream, NormSums


@torch.no_grad()
def repair_outside(stream: NarrowStream, wide: LayerwiseForward) -> None:
    """Repair the final norm and the head of the narrow model; hidden states are those after the last layer."""
    narrow, outside = stream.forward, stream.hidden.outside
    norms, readers = norms_of(outside), readers_of(outside)
    for name, factor_K in _factors(stream, wide, norms=list(norms)).items():
        weight = tensor_of(narrow.decoder.skeleton, norms[name].name)
        weight.data = scaled_norm(weight.data, norms[name], factor=factor_K)
    head = _head(narrow)
    if head not in readers:
        return
    inputs = ((one.batch, one.input, two.input) for one, two in zip(_tails(narrow, []), _tails(wide, []), strict=True))
    mixing_DK = stream.solve_map(inputs, where="the head's inputs")
    for one in readers[head]:
        value = mix_inputs(tensor_of(wide.decoder.skeleton, one.name), one.dim, mixing_DK=mixing_DK)
        tensor_of(narrow.decoder.skeleton, one.name).data = value


def _factors(stream: NarrowStream, wide: LayerwiseForward, *, norms: list[str]) -> dict[str, Tensor]:
    """Return the factor of each channel of the last norm before the head, by its name."""
    sums: dict[str, NormSums] = {}
    for wide_tail, narrow_tail in zip(_tails(wide, norms), _tails(stream.forward, norms), strict=True):
        name = wide_tail.last_norm
        if name is None:
            return {}
        if name not in sums:
            sums[name] = NormSums(stream.forward.decoder.skeleton.get_submodule(name), stream.keep_K)
        wanted_BLD = wide_tail.norms[name]
        sums[name].add(narrow_tail.norms[name], wanted_BLD[..., stream.keep_K.to(wanted_BLD.device)])
    return {name: one.factor() for name, one in sums.items()}


@dataclass
class _Tail:
    """Outputs of the norms called before the head, in order, and the input [B, L, D] of the head, of one batch."""

    batch: int
    norms: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Tensor] = field(default_factory=list)

    @property
    def last_norm(self) -> str | None:
        """Name of the norm that is called last."""
        return next(reversed(self.norms), None)

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


def _tails(forward: LayerwiseForward, norms: list[str]) -> Iterator[_Tail]:
    """Yield what follows the last layer, batch by batch, without the logits."""
    skeleton = forward.decoder.skeleton
    head = skeleton.get_output_embeddings()
    for batch in range(len(forward.batches)):
        tail = _Tail(batch)
        with ExitStack() as hooks, suppress(_ReachedHeadError):
            for name in norms:
                hooks.enter_context(outputs_of(skeleton.get_submodule(name), partial(tail.norms.__setitem__, name)))
            hooks.enter_context(inputs_of(head, tail.stop))
            forward.logits(batch)
        yield tail


def _head(forward: LayerwiseForward) -> str:
    head: nn.Module = forward.decoder.skeleton.get_output_embeddings()
    path: str = next(path for path, module in forward.decoder.skeleton.named_modules() if module is head)
    return path
