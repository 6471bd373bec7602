"""Memory of a process: what the heap and oneDNN keep, and what goes back to the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Frees 320 MB, in tensors of 64 MB, and says how much of that the process still holds before and after a trim.
TENSORS = """
import json, torch
from llmprune.common.process_memory import keep_freed_memory, proc_field, trim_if_large
anonymous = lambda: proc_field("status", "RssAnon:", unit=1024)
keep_freed_memory()
before = anonymous()
held = [torch.ones(16 << 20) for _ in range(5)]
del held
freed = anonymous()
trim_if_large()
print(json.dumps([freed - before, anonymous() - before]))
"""

# Frees a tensor of 64 MB that is not in the heap, and says how much memory it took and how much of that is still held.
OUTSIDE = """
import json, torch
from llmprune.common.process_memory import empty_outside_heap, keep_freed_memory, proc_field
anonymous = lambda: proc_field("status", "RssAnon:", unit=1024)
keep_freed_memory()
before = anonymous()
held = empty_outside_heap([4, 4096, 1024], torch.float32).fill_(1)
taken = anonymous() - before
assert held.shape == (4, 4096, 1024)
del held
print(json.dumps([taken, anonymous() - before]))
"""

# Multiplies by 128 matrices of different heights, and says how much memory the last 64 products took for good.
PRODUCTS = """
import json, torch
from llmprune.common.process_memory import bound_kernel_caches, proc_field
bound_kernel_caches()
anonymous = lambda: proc_field("status", "RssAnon:", unit=1024)
weight = torch.ones(512, 512, dtype=torch.bfloat16)
for rows in range(1, 129):
    torch.ones(rows, 512, dtype=torch.bfloat16) @ weight
    before = anonymous() if rows == 64 else before if rows > 64 else 0
print(json.dumps(anonymous() - before))
"""


def _printed(program: str, settings: dict[str, str]) -> Any:
    """Return what a program prints as JSON in a process with these settings and none of the allocator's else."""
    left_out = ("MALLOC_", "GLIBC_", "ONEDNN_", "LRU_CACHE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | settings)
    return json.loads(done.stdout)


LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux, which counts pages")


@LINUX
def test_freed_memory_is_kept_until_it_is_much() -> None:
    """The next tensor may use it again, and a trim gives it back; unless the user has set the allocator."""
    kept, trimmed = _printed(TENSORS, {})
    by_user, _ = _printed(TENSORS, {"MALLOC_MMAP_THRESHOLD_": "1048576"})
    assert kept > 256 << 20
    assert trimmed < 64 << 20
    assert by_user < 64 << 20


@LINUX
def test_a_large_tensor_outside_the_heap_is_given_back_at_once() -> None:
    """It takes the memory of its elements, none of which the process holds when it is freed."""
    taken, held = _printed(OUTSIDE, {})
    assert taken >= 64 << 20
    assert held < 8 << 20


@LINUX
def test_products_of_many_shapes_take_bounded_memory() -> None:
    """Where oneDNN compiles half-precision products for every shape, code of few shapes is kept."""
    assert _printed(PRODUCTS, {}) < 12 << 20
