"""Shares of a step's time in kernels, copies and waits, from a trace of torch.profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]
Interval = tuple[float, float]  # start and end in microseconds
_WAITS = "Synchronize"  # ending of cudaStreamSynchronize, cudaDeviceSynchronize and cudaEventSynchronize


def time_shares(events: Iterable[Event], step: str) -> dict[str, Any]:
    """Return the shares of the time of a step, an annotation in the trace.

    ``kernels`` and ``copies``: times in which the device does at least one; ``copies_alone``: copies while no kernel
    runs; ``idle``: the device does neither. ``waits``: time in which the host waits for the device, and
    ``wait_calls`` how often. A kernel that started in the step and ends after it counts up to the end of the step.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = next(
        _interval(event) for event in timed if event.get("cat") == "user_annotation" and event["name"] == step
    )
    inside = [event for event in timed if event["ts"] < end and event["ts"] + event["dur"] > start]

    def merged(chosen: Iterable[Event]) -> list[Interval]:
        clipped = ((max(since, start), min(until, end)) for since, until in map(_interval, chosen))
        return _union(clipped)

    kernels = merged(event for event in inside if event.get("cat") == "kernel")
    copies = merged(event for event in inside if event.get("cat") == "gpu_memcpy")
    busy = _union([*kernels, *copies])
    waits = [event for event in inside if event.get("cat") == "cuda_runtime" and event["name"].endswith(_WAITS)]
    seconds = end - start
    return {
        "seconds": round(seconds / 1e6, 3),
        "kernels": round(_length(kernels) / seconds, 4),
        "copies": round(_length(copies) / seconds, 4),
        "copies_alone": round((_length(busy) - _length(kernels)) / seconds, 4),
        "idle": round(1 - _length(busy) / seconds, 4),
        "waits": round(_length(merged(waits)) / seconds, 4),
        "wait_calls": len(waits),
    }


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same times as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
