"""Anonymous memory of processes: what each holds alone, without mapped files and the page cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

_BARE = """
from llmprune.common.libraries import import_libraries
import_libraries(announced=False)
import datasets
import llmprune.pipeline.run
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM
print(open("/proc/self/status").read())
"""


def of_bare_interpreter() -> int:
    """Return the bytes of an interpreter that imported what a run imports, and did nothing else."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    done = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=True, env=environment)
    return _field(done.stdout)


def peak_of(process: subprocess.Popen[str]) -> int:
    """Return the most bytes of a process until it ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, _now(process.pid))
        time.sleep(0.02)
    return peak


def peaks_of_workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the most bytes of each process that torchrun started, until it ends."""
    peaks: dict[int, int] = {}
    while launcher.poll() is None:
        for worker in psutil.Process(launcher.pid).children():
            peaks[worker.pid] = max(peaks.get(worker.pid, 0), _now(worker.pid))
        time.sleep(0.02)
    return [peaks[pid] for pid in sorted(peaks)]


def _now(pid: int) -> int:
    try:
        return _field(Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has just ended
        return 0


def _field(status: str) -> int:
    """Return RssAnon of /proc/PID/status in bytes; 0 of a process that has ended and holds no memory."""
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
