"""Rules of single operations on CUDA: which mix devices, which write, which wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.devices.storages import CPU, home_of

# These make no tensor, or change only what autograd knows; they do not look at values.
ASK = {"shape", "dtype", "ndim", "is_meta", "requires_grad", "dim", "size", "numel", "requires_grad_", "detach_"}
# These take tensors of several devices: they only look at one of them, or hand on a memo.
_MIX = {"data", "grad", "__deepcopy__", "_has_compatible_shallow_copy_type", "is_same_size"}
# Kernels that refuse a tensor without dimensions on the CPU as well.
_STRICT = {"equal", "cat", "stack", "index_select", "index_copy", "index_add", "gather", "embedding", "tensordot"}
_INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}  # indices may be on the CPU
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__setitem__"}
# The host reads values: without a device at once, otherwise it waits.
HOST_READS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "is_nonzero",
    "equal", "allclose", "data_ptr", "numpy", "__array__",
}  # fmt: skip
# The size of the result depends on values, or the kernel's report of errors is read.
_WAITS = {
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount", "histc",
    "linalg_cholesky", "cholesky", "linalg_inv", "inverse", "linalg_eigh", "linalg_eigvalsh", "linalg_svd", "svd",
    "linalg_svdvals", "linalg_solve", "linalg_lstsq", "linalg_ldl_factor", "linalg_lu_factor",
}  # fmt: skip


def name_of(func: Any) -> str:
    """Return the name of a function of torch, or of the attribute that it gets or sets."""
    if func is torch.autograd.grad:
        return "autograd.grad"
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name in ("__get__", "__set__") else name


def collect(value: Any, found: list[Tensor]) -> None:
    """Append the tensors in a value to ``found``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, found)
    elif isinstance(value, dict):
        collect(list(value.values()), found)


def written_by(name: str, tensors: list[Tensor], out: Any) -> list[Tensor]:
    """Return the tensors that an operation writes in place."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    written = tensors[:1] if in_place else []
    collect(out, written)
    return written


def home_of_call(name: str, args: Any, tensors: list[Tensor], out: Any) -> torch.device:
    """Return the device of an operation's result. Raises RuntimeError where its tensors are on several devices."""
    homes = list(map(home_of, tensors))
    if len(set(homes)) < 2 or name in _MIX:
        return homes[0] if homes else CPU
    never_scalars = set(map(id, tensors if name in _STRICT else written_by(name, tensors, out)))
    spared = _spared_indices(*args) if name in _INDEXED else set()
    strict = [
        home
        for tensor, home in zip(tensors, homes, strict=True)
        if id(tensor) not in spared and (tensor.dim() or home != CPU or id(tensor) in never_scalars)
    ]
    if len(set(strict)) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{strict[0]} and {next(home for home in strict if home != strict[0])}! ({name}, simulated)"
        )
    return strict[0]


def _spared_indices(tensor: Tensor, index: Any, value: Any = None, *_: Any) -> set[int]:
    """Return the ids of tensors that may be elsewhere: indices on the CPU, and values without tensor indices."""
    indices: list[Tensor] = []
    collect(index, indices)
    values = [value] if isinstance(value, Tensor) and (not indices or not value.dim()) else []
    return {id(one) for one in (*values, *(index for index in indices if home_of(index) == CPU))}


def waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Check that the host waits in an operation on a device for values of it."""
    if name in _WAITS or (name in HOST_READS and name != "data_ptr"):
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "one_hot":
        return len(args) + len(kwargs) == 1 or -1 in (*args[1:], *kwargs.values())
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    if name in ("__getitem__", "index"):
        return any(_is_mask(index) or _is_slice_by_tensor(index) for index in _parts(args[1]))
    if name in ("__setitem__", "index_put_", "index_put"):  # a single value is filled in without a look at the mask
        value = args[2]
        return any(map(_is_mask, _parts(args[1]))) and isinstance(value, Tensor) and value.numel() != 1
    return False


def copied_indices(name: str, args: Any) -> list[Any]:
    """Return the indices on the CPU, in tensors and lists, that are copied to the device of the tensor they index."""
    if name not in _INDEXED:
        return []
    return [
        index
        for index in _parts(args[1])
        if (isinstance(index, list) and index) or (isinstance(index, Tensor) and index.dim() and home_of(index) == CPU)
    ]


def _parts(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_slice_by_tensor(index: Any) -> bool:
    return isinstance(index, slice) and any(
        isinstance(end, Tensor) and home_of(end) != CPU for end in (index.start, index.stop, index.step)
    )
