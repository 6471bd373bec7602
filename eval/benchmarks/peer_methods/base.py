"""Interface of a peer, and the activations of the dense model that peers share.

Shapes in names: B batch, N windows, L sequence length, D hidden size, F neurons of an MLP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BATCH = 2  # windows of a forward pass
DecoderLayer = Any  # shaped like Llama's or Gemma 3's, with ``mlp`` and ``self_attn``


@dataclass(frozen=True)
class Trace:
    """Activations of one batch.

    ``hidden_BLD``: the residual stream before every layer and behind the last one; ``written_BLD``: what the MLP of
    each layer added to it; ``neurons_BLF``: the input of each down projection.
    """

    hidden_BLD: list[Tensor]
    written_BLD: list[Tensor]
    neurons_BLF: list[Tensor]


class Peer(ABC):
    """A pruning method of others.

    A peer is made for one model and one calibration. ``observe`` sees every batch of one forward pass that all peers
    share, in float32; ``prune`` is called with a copy of the same model.
    """

    removes: ClassVar[Literal["layers", "neurons"]]

    def __init__(self, amounts: Sequence[int]) -> None:
        """``amounts``: the numbers of layers, or of neurons of each MLP, that ``prune`` will be asked to remove."""
        self.amounts = tuple(amounts)

    def observe(self, trace: Trace) -> None:  # noqa: B027 - peers without statistics leave it
        """Add a batch to the statistics."""

    @property
    def observes(self) -> bool:
        """Whether the peer needs the shared forward pass."""
        return type(self).observe is not Peer.observe

    @abstractmethod
    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Prune the model in place; returns the layers that were removed."""


def residual_writer(layer: DecoderLayer) -> nn.Module:
    """Return the module whose output the layer adds to the residual stream last: its MLP, or the norm behind it."""
    writer: nn.Module = getattr(layer, "post_feedforward_layernorm", layer.mlp)
    return writer


def trace(model: PreTrainedModel, ids_BL: Tensor) -> Trace:
    """Run the decoder without its head, and return what it computed."""
    seen = Trace([], [], [])
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda _module, inputs: seen.hidden_BLD.append(inputs[0]))
            )
            hooks.enter_context(
                residual_writer(layer).register_forward_hook(
                    lambda _module, _inputs, output: seen.written_BLD.append(output)
                )
            )
            hooks.enter_context(
                layer.mlp.down_proj.register_forward_pre_hook(
                    lambda _module, inputs: seen.neurons_BLF.append(inputs[0])
                )
            )
        hooks.enter_context(
            model.model.norm.register_forward_pre_hook(lambda _module, inputs: seen.hidden_BLD.append(inputs[0]))
        )
        model.model(input_ids=ids_BL, use_cache=False)
    return seen


@torch.no_grad()
def observe(model: PreTrainedModel, peers: Sequence[Peer], windows_NL: Tensor) -> None:
    """Show all windows to the peers that want statistics, in one forward pass."""
    observers = [peer for peer in peers if peer.observes]
    if not observers:
        return
    for ids_BL in torch.split(windows_NL, BATCH):
        seen = trace(model, ids_BL)
        for peer in observers:
            peer.observe(seen)


def evenly_spaced(windows_NL: Tensor, count: int) -> Tensor:
    """Return at most so many of the windows, from all parts of the calibration."""
    if len(windows_NL) <= count:
        return windows_NL
    return windows_NL[torch.arange(count) * len(windows_NL) // count]
