"""Gradient descent on all weights of one layer: float32 master weights, Adam, summed gradients of all processes.

Adam moves every entry of a tensor by about the learning rate, which is therefore relative to the root mean square of
the tensor's entries: one rate serves norms and matrices of any model.

Shapes: L sequence length, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.common.distributed import sum_over_processes
from llmprune.layerwise.decoder import Tensors

_RATE = 0.002  # highest learning rate, in units of a tensor's RMS
_BETAS = (0.9, 0.95)  # as is usual for few steps; Adam's 0.999 would average over more of them than there are
_WARMUP = 8  # steps in which the learning rate rises
_NO_DERIVATIVE = ("derivative for", "not implemented", "inplace operation", "in-place operation")  # autograd's words
_SLOWER = 0.3  # of the learning rate, after a step back
_LEAST_RMS = 1e-2  # of a tensor, in units of the layer's RMS: biases may begin as zeros


def cloned(tensors: Tensors) -> Tensors:
    """Return copies of a layer's tensors; names that share memory share the copy."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    return {name: copies.setdefault(_memory(tensor), tensor.detach().clone()) for name, tensor in tensors.items()}


@torch.enable_grad()
def add_gradients(losses: Iterator[Tensor]) -> bool:
    """Add the gradients of losses, one after the other, to the trained parameters.

    Return False if a loss cannot be differentiated: it has no gradient, or an operation has no derivative.
    """
    try:
        for loss in losses:
            if not loss.requires_grad:
                return False
            torch.autograd.backward(loss)
    except RuntimeError as error:  # of autograd: it has no class of its own for an operation without a derivative
        if not any(words in str(error) for words in _NO_DERIVATIVE):
            raise
        return False
    return True


@dataclass(frozen=True)
class _Weight:
    """A trained tensor in float32, and the layer's parameters that hold it, in the layer's own type."""

    master: Tensor
    parameters: list[Tensor]

    def take_gradient(self) -> None:
        """Move the gradient of the parameters to the master: zero where the loss does not depend on them."""
        total: Tensor | None = None
        for parameter in self.parameters:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                total = gradient if total is None else total + gradient
                parameter.grad = None
        self.master.grad = torch.zeros_like(self.master) if total is None else total


class LayerTrainer:
    """Trains the floating-point parameters of a layer in place, for a number of ``steps`` known in advance.

    The learning rate rises for some steps and falls along a cosine to zero.
    """

    def __init__(self, layer: nn.Module, *, steps: int) -> None:
        self.layer, self._steps, self._done = layer, steps, 0
        shared: dict[tuple[int, torch.Size, tuple[int, ...]], list[Tensor]] = {}
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                shared.setdefault(_memory(parameter), []).append(parameter.requires_grad_())
        self._weights = [_Weight(own[0].detach().float(), own) for own in shared.values()]
        masters = [weight.master for weight in self._weights]
        least = _LEAST_RMS * _rms(masters)
        self._rates, self._factor = [_RATE * max(_rms([master]), least) for master in masters], 1.0
        self._adam = self._optimizer()

    def go_back(self, parameters: Tensors) -> None:
        """Set the layer's parameters to those of an earlier step, by name, and go on in smaller steps."""
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(parameters[name])
            for weight in self._weights:
                weight.master.copy_(weight.parameters[0])
        self._factor *= _SLOWER
        self._adam = self._optimizer()

    def _optimizer(self) -> torch.optim.Adam:
        groups = [{"params": [weight.master]} for weight in self._weights]
        return torch.optim.Adam(groups, betas=_BETAS, fused=True)

    def step(self) -> None:
        """Take a step along the gradients that backward passes of all processes have left in the parameters."""
        for weight in self._weights:
            weight.take_gradient()
        sum_over_processes([weight.master.grad for weight in self._weights if weight.master.grad is not None])
        factor = min(1.0, (self._done + 1) / _WARMUP) * (1 + math.cos(math.pi * self._done / self._steps)) / 2
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * self._factor
        self._adam.step()
        self._done += 1
        with torch.no_grad():
            for weight in self._weights:
                first = weight.parameters[0]  # its memory is that of the others
                weight.master.grad = None
                if first.dtype != weight.master.dtype:
                    first.copy_(weight.master)


def _rms(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square of the entries of all tensors."""
    squares = sum(float(tensor.square().sum(dtype=torch.float32)) for tensor in tensors)
    return math.sqrt(squares / max(sum(tensor.numel() for tensor in tensors), 1))


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
