"""Temporary changes of modules: change outputs, or skip the computation (``anatomy.hooks`` observes them).

Each is a context manager; the module is as before when the context ends.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.projections import outputs_of_projection


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of every call of a module by ``change(output)``."""
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def zero_output(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Make modules return zeros, bias included; projections without computing their product."""
    with ExitStack() as undo:
        for module in modules:
            outputs = outputs_of_projection(module)
            if outputs is None:
                undo.enter_context(changed_output(module, _zeros))
            else:
                module.__dict__["forward"] = lambda value, outputs=outputs: value.new_zeros(*value.shape[:-1], outputs)
                undo.callback(module.__dict__.pop, "forward")
        yield


@contextmanager
def computed_by(module: nn.Module, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make a module return ``compute(input)``."""
    module.__dict__["forward"] = compute
    try:
        yield
    finally:
        module.__dict__.pop("forward")


@dataclass(frozen=True)
class CachedOutput:
    """Output of a module that is not computed again.

    ``items``: number of values the module returns, the others being None; 0 where it returns the tensor alone.
    """

    value: Tensor
    items: int

    def returned(self) -> Any:
        """Return the output in the form in which the module returns it."""
        return (self.value, *[None] * (self.items - 1)) if self.items else self.value


@contextmanager
def return_cached(layer: nn.Module, outputs: Mapping[str, CachedOutput]) -> Iterator[None]:
    """Make modules of a layer, by path, return cached outputs instead of computing them."""
    modules = {layer.get_submodule(path): output.returned() for path, output in outputs.items()}
    for module, value in modules.items():
        module.__dict__["forward"] = lambda *_, value=value, **__: value
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward")


def _zeros(output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
