"""Memory of this process: peaks, and what the heap does with memory that is freed.

Peaks come from Linux or CUDA; other systems report none.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PROC = Path("/proc/self")

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 2**31 - 1  # bytes; the largest value that mallopt takes
_MOST_FREE = 256 << 20  # bytes that the heap may keep from one layer to the next
_LARGE_TENSOR = 16 << 20  # bytes
# Settings of oneDNN and of torch's cache before it: numbers of shapes whose half-precision products stay compiled.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
_outside_heap: int | None = None  # anonymous bytes of the process that were not the heap's; None: nothing is kept


def keep_freed_memory() -> None:
    """Let the heap keep large blocks that are freed, so that the next tensor of their size gets the same pages.

    By default glibc gives blocks of 32 MB and more back to the system at once, which clears every page again when the
    next tensor needs them. One heap serves all threads, because those of other threads hold no large blocks. Settings
    of the user in the environment win; other C libraries are left as they are. ``trim`` and ``trim_if_large``
    give the memory back: a heap that is never trimmed grows with the layers, because the next tensor need not lie where
    the last one was.
    """
    global _outside_heap
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    mallopt, in_use = getattr(_libc(), "mallopt", None), _heap_in_use()
    if mallopt is None or in_use is None or set_by_user:
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _LARGE)
    mallopt(_ARENA_MAX, 1)
    _outside_heap = _anonymous() - in_use


def bound_kernel_caches() -> None:
    """Bound the code that oneDNN keeps of products on the CPU; it must be called before the first product.

    oneDNN compiles a product for every shape of its operands and keeps 1024 of them, of 0.6 MB each. Every expert of a
    mixture has another number of tokens in every batch, so that the cache grows by 20 MB and more a layer. A layer that
    all tokens pass has few shapes, the same in all layers. Settings of the user in the environment win.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def empty_outside_heap(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor for the CPU whose pages, if it is large, go back to the system when it is freed.

    In the heap a large tensor that lives as long as a layer leaves a gap that the tensors of the next layer need not
    fill. The content is undefined.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_TENSOR or sys.platform == "win32":
        return torch.empty(*shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def trim() -> None:
    """Return free heap memory to the system."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def trim_if_large() -> None:
    """Return free heap memory to the system if the heap keeps more of it than it may from one layer to the next."""
    in_use = _heap_in_use()
    if _outside_heap is not None and in_use is not None and _anonymous() - in_use - _outside_heap > _MOST_FREE:
        trim()


def _anonymous() -> int:
    """Return the bytes of this process in memory that no file backs."""
    return proc_field("status", "RssAnon:", unit=1024) or 0


def _heap_in_use() -> int | None:
    """Return the bytes that the heap has given out; None where the C library does not say."""
    mallinfo = getattr(_libc(), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _HeapState
    state = mallinfo()
    return int(state.uordblks + state.hblkhd)


class _HeapState(ctypes.Structure):
    """Result of mallinfo2(3). ``uordblks``, ``hblkhd``: bytes in use in the heap, and in blocks of their own."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def reset_peak() -> int:
    """Reset the peak to the bytes in use now and return them: memory of all GPUs, or resident memory without one.

    Returns 0 where the system does not report memory.
    """
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    for gpu in _gpus():
        torch.cuda.reset_peak_memory_stats(gpu)
    if _gpus():
        return sum(map(torch.cuda.memory_allocated, _gpus()))
    return proc_field("status", "VmRSS:", unit=1024) or 0


def peak_memory() -> int:
    """Return the maximum bytes in use since ``reset_peak``; 0 where the system does not report memory."""
    return sum(map(torch.cuda.max_memory_allocated, _gpus())) if _gpus() else peak_resident() or 0


def peak_of_gpus() -> int | None:
    """Return the maximum bytes in use since ``reset_peak`` on the GPU that had the most; None without a GPU."""
    return max(map(torch.cuda.max_memory_allocated, _gpus()), default=None)


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def peak_resident() -> int | None:
    """Return the maximum bytes of resident memory since ``reset_peak``, mapped files included; None if unknown."""
    return proc_field("status", "VmHWM:", unit=1024)


def proc_field(file: str, name: str, *, unit: int = 1) -> int | None:
    """Return a field of ``/proc/self/FILE`` times ``unit``; None on systems without it."""
    try:
        lines = (_PROC / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)
