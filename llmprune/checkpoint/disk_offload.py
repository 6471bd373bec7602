"""Make folders for weights that the device map leaves on disk in another form than their files have.

Weights that the files have in the form that they need in memory are read from these files. Experts of a mixture, which
transformers stacks, are written to such a folder once and read from there layer by layer.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from llmprune.common.files import disk_errors

_open_locks: list[int] = []  # file descriptors, never closed: a lock lasts as long as the process


def offload_folder() -> Path:
    """Make a folder under HF_HOME, and remove those of processes that were killed.

    Raises DiskError where it cannot be made.
    """
    from huggingface_hub.constants import HF_HOME

    parent = Path(HF_HOME) / "llmprune" / "offload"
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        guard = os.open(parent / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            for left in parent.glob("*.lock"):
                if left.name != ".lock":
                    _remove_if_abandoned(left)
            folder = Path(tempfile.mkdtemp(dir=parent))
            lock = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            _open_locks.append(lock)
        finally:
            os.close(guard)
    return folder


def _remove_if_abandoned(lock: Path) -> None:
    """Remove a folder and its lock if the process that locked it has ended."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    finally:
        os.close(descriptor)
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink()
