"""Errors of pinned host memory, which the CUDA runtime reports in the words that it has for a full GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmprune.common.errors import DeviceError, to_continue
from llmprune.common.machine_memory import free_memory
from llmprune.common.schema import format_size


@contextmanager
def pinning() -> Iterator[None]:
    """Raise DeviceError where the block cannot pin the host memory that it asks for, and does nothing else."""
    try:
        yield
    except torch.OutOfMemoryError:  # of a GPU: torch's allocator of host memory raises a plain error
        raise
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise DeviceError(
            "the main memory is full, not the GPU: no more of it can be pinned for copies to and from the GPU "
            f"({format_size(free_memory())} are free); end other programs, raise the limit of locked memory "
            "(ulimit -l), lower calibration.stream_memory, which moves hidden states to the disk, or use fewer GPUs "
            f"with devices, and {to_continue()}"
        ) from error
