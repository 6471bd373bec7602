"""Cut residual channels out of tensors, and find what reads them while a model runs.

Shapes in names: B batch, L sequence length, D hidden size, K channels kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.selection import select_along
from llmprune.anatomy.types import HiddenDim

_ROWS_AT_ONCE = 2**14  # of a weight that is converted


def kept_channels(dims: Iterable[HiddenDim], keep_K: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return the channels that stay in each tensor, for ``select_along``."""
    return {one.name: (one.dim, keep_K) for one in dims}


def readers_of(dims: Iterable[HiddenDim]) -> dict[str, list[HiddenDim]]:
    """Return the tensors that read channels, by the module that holds them."""
    found: dict[str, list[HiddenDim]] = {}
    for one in dims:
        if one.role == "reads":
            found.setdefault(one.module, []).append(one)
    return found


def norms_of(dims: Iterable[HiddenDim]) -> dict[str, HiddenDim]:
    """Return the weights of norms over the channels, by the module that holds them."""
    return {one.module: one for one in dims if one.role == "scales"}


@contextmanager
def channels_read(module: nn.Module, paths: Iterable[str], *, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(path, input)`` with the first argument of every call of the modules at some paths."""

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(path, first_tensor(args, kwargs))

    with ExitStack() as hooks:
        for path in paths:
            handle = module.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first argument of a call, by position or by name."""
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor), "a module that reads channels is called with them"
    return found


def mix_inputs(tensor: Tensor, dim: int, *, mixing_DK: Tensor) -> Tensor:
    """Return a weight that reads K channels as the given one reads D: W M along its dimension of inputs.

    A weight with many outputs, such as a head's, is converted part by part.
    """
    mixing_DK = mixing_DK.to(tensor.device)

    def mix(part: Tensor) -> Tensor:
        mixed = torch.tensordot(part.to(mixing_DK.dtype), mixing_DK, dims=([dim], [0]))
        weight: Tensor = mixed.movedim(-1, dim).to(tensor.dtype)
        return weight

    return torch.cat([mix(part) for part in torch.split(tensor, _ROWS_AT_ONCE if dim else len(tensor))]).contiguous()


def has_unit_offset(norm: nn.Module, weight: str) -> bool:
    """Check that a norm multiplies by one plus its weight, as Gemma's does."""
    parameter = tensor_of(norm, weight)
    ones_1D = torch.ones(1, len(parameter), dtype=parameter.dtype, device=parameter.device)
    ones_1D[:, ::2] = -1  # so that a norm that subtracts the mean leaves something
    before = parameter.data
    try:
        parameter.data = torch.zeros_like(before)
        shift = getattr(norm, "bias", None)
        output_1D: Tensor = norm(ones_1D) - (0 if shift is None else shift)
        return bool(output_1D.abs().max() > 0.5)
    finally:
        parameter.data = before


def cut_channels(
    tensors: Mapping[str, Tensor], dims: Iterable[HiddenDim], *, keep_K: Tensor, size: int
) -> dict[str, Tensor]:
    """Return tensors with the kept ones of ``size`` channels, as if the others were zero.

    A norm divides by the root of the mean over all channels, so its weight is multiplied by √(size / K).
    """
    dims = list(dims)
    cut = select_along(tensors, kept_channels(dims, keep_K))
    for one in dims:
        if one.role == "scales" and one.name in cut:
            cut[one.name] = scaled_norm(cut[one.name], one, factor=(size / len(keep_K)) ** 0.5)
    return cut


def scaled_norm(weight_K: Tensor, one: HiddenDim, *, factor: Tensor | float) -> Tensor:
    """Return the weight of a norm whose output, without its bias, is ``factor`` times as large."""
    offset = 1.0 if one.has_offset else 0.0
    return ((weight_K.float() + offset) * factor - offset).to(weight_K.dtype)
