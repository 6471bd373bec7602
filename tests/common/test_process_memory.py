"""Freed memory of the heap: kept for the next tensor, and given back where it is much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux, which counts pages and their faults")
def test_freed_memory_is_kept_until_it_is_much() -> None:
    """The next tensor may use it again, and a trim gives it back; unless the user has set the allocator."""
    found = []
    for setting in ({}, {"MALLOC_MMAP_THRESHOLD_": "1048576"}):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", TENSORS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | setting)
        found.append(json.loads(done.stdout))
    (kept, trimmed), (by_user, _) = found
    assert kept > 256 << 20
    assert trimmed < 64 << 20
    assert by_user < 64 << 20
