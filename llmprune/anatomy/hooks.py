"""Observe the inputs and outputs of modules while a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def inputs_of(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the first argument of every call of a module, while the context lasts."""
    handle = module.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs_of(module: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Call ``see`` with the output of every call of a module, while the context lasts."""
    handle = module.register_forward_hook(lambda _, __, output: see(output))
    try:
        yield
    finally:
        handle.remove()
