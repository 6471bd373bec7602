"""Memory of this process: peaks, and what the heap does with memory that is freed.

Peaks come from Linux or CUDA; other systems report none.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")


# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 2**31 - 1  # bytes; the largest value that mallopt takes


def keep_freed_memory() -> None:
    """Let the heap keep large blocks that are freed, so that the next tensor of their size gets the same pages.

    By default glibc gives blocks of 32 MB and more back to the system at once, which clears every page again when the
    next tensor needs them. One heap serves all threads, because those of other threads hold no large blocks. Settings
    of the user in the environment win; other C libraries are left as they are. ``trim`` gives the memory back.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None or set_by_user:
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _LARGE)
    mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Return free heap memory to the system."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


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
