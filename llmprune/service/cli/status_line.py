"""Line below the progress bar of a watched job: its place in the queue, or its throughput and use of the machine."""

from __future__ import annotations

from llmprune.common.printing import printable
from llmprune.common.schema import format_size
from llmprune.service.monitoring.run_progress import RunProgress
from llmprune.service.monitoring.usage import JobUse, UsageSample


def status_line(progress: RunProgress, use: JobUse) -> str:
    """Return the place of a job in the queue, or its time left, throughput and use of the machine, in words."""
    if progress.queue is not None:
        return printable(progress.queue.words)
    if progress.left is None:
        return ""
    parts = [progress.left.words, progress.throughput]
    if use.samples:
        parts += _in_words(use.samples[-1], use.memory_limit)
    return printable(", ".join(filter(None, parts)))


def _in_words(sample: UsageSample, limit: int | None) -> list[str]:
    """Describe a sample, such as ``CPU 195 %``, ``memory 1.2 GB of 8 GB``, ``GPU 0 97 % 40 GB``."""
    parts = []
    if sample.cpu is not None:
        parts.append(f"CPU {sample.cpu:.0f} %")
    if sample.memory is not None:
        of = f" of {format_size(limit)}" if limit else ""
        parts.append(f"memory {format_size(sample.memory)}{of}")
    for gpu in sample.gpus:
        busy = "" if gpu.percent is None else f" {gpu.percent:.0f} %"
        full = "" if gpu.memory is None else f" {format_size(gpu.memory)}"
        parts.append(f"GPU {gpu.name}{busy}{full}")
    return parts
