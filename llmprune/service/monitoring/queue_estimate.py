"""Place of a waiting job in the queue, and when it starts: the supervisor's own rule, played forward in time.

A running job ends when its time left is over; a waiting job runs as long as earlier jobs of its kind did. Where a job
in front has no such time, the moment found so far is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from llmprune.common.time_left import rough_duration
from llmprune.results.formatting import plural
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.sweeps.shared_scores import WAITS
from llmprune.service.supervisor.devices import Machine, uses_this_machine


class QueuePlace(BaseModel):
    """Place of a job in the queue."""

    position: int = Field(description="1: it is next.")
    waiting: int = Field(description="Jobs in the queue, this one included.")
    kind: Literal["estimated", "at least", "unknown"] = Field(
        description="at least: a job in front has no estimate. unknown: nothing is known about the jobs in front."
    )
    starts_in: float | None = Field(description="Seconds until it starts, or at least so many; null: not known.")
    words: str = Field(description="The same in words.")


@dataclass(frozen=True)
class QueueState:
    """Jobs that run, and the first of those that wait, in the order in which they start.

    ``order``: ids of all waiting jobs. ``seconds``: that a job still takes, if known. ``paused``: why no job starts,
    if so. ``remote``: launchers of other machines.
    """

    machine: Machine
    running: Sequence[Job]
    waiting: Sequence[Job]
    order: Sequence[str]
    seconds: Mapping[str, float]
    remote: frozenset[str]
    paused: str | None = None


@dataclass(frozen=True)
class _Start:
    """Start of a job. ``seconds`` from now, or at least so many where ``reason`` says why they are not known."""

    seconds: float
    reason: str | None = None


def places_of(queue: QueueState) -> dict[str, QueuePlace]:
    """Return the place of every waiting job."""
    starts: dict[str, _Start] = {}
    if not queue.paused:
        for jobs in (_pushes, _on_processors, _on_gpus):  # jobs of one kind never wait for those of another
            starts |= _starts(queue, jobs)
    known = {job.id: job for job in queue.waiting}
    places = {}
    for position, job in enumerate(queue.order, start=1):
        where = "next in the queue" if position == 1 else f"number {position:,} in the queue"
        kind, seconds, when = _described(starts.get(job), known.get(job), queue=queue)
        words = f"{where}; {when}"
        places[job] = QueuePlace(position=position, waiting=len(queue.order), kind=kind, starts_in=seconds, words=words)
    return places


def _described(
    start: _Start | None, job: Job | None, *, queue: QueueState
) -> tuple[Literal["estimated", "at least", "unknown"], float | None, str]:
    """Return how well a start is known, the seconds until then, and both in words."""
    if queue.paused:
        return "unknown", None, queue.paused
    if job is not None and job.step is not None and job.step.startswith(WAITS):
        return "unknown", None, f"it {job.step}"
    if start is None and job is not None and job.launcher in queue.remote:
        return "unknown", None, "another machine decides when it starts"
    if start is None:
        return "unknown", None, "it is not known when it starts, because too many jobs are in front of it"
    if start.reason is None:
        when = "starts now" if start.seconds < 1 else f"starts in about {rough_duration(start.seconds)}"
        return "estimated", start.seconds, when
    if start.seconds < 1:
        return "unknown", None, f"it is not known when it starts, because {start.reason}"
    return "at least", start.seconds, f"starts in at least {rough_duration(start.seconds)}; {start.reason}"


def _pushes(queue: QueueState, job: Job) -> bool:
    del queue
    return job.source is not None


def _on_processors(queue: QueueState, job: Job) -> bool:
    return uses_this_machine(job, queue.remote) and not job.gpus


def _on_gpus(queue: QueueState, job: Job) -> bool:
    return uses_this_machine(job, queue.remote) and bool(job.gpus)


def _starts(queue: QueueState, is_of_kind: Callable[[QueueState, Job], bool]) -> dict[str, _Start]:
    """Return the starts of the first waiting jobs of a kind."""
    waiting = [job for job in queue.waiting if is_of_kind(queue, job)]
    running = {job.id: job for job in queue.running if is_of_kind(queue, job)}
    ends = {job: queue.seconds.get(job) for job in running}
    starts: dict[str, _Start] = {}
    now = 0.0
    while waiting:
        for start in queue.machine.startable(waiting, list(running.values()), remote_capacity={}):
            job, seconds = start.job, queue.seconds.get(start.job.id)
            starts[job.id] = _Start(round(now, 1))
            running[job.id] = job.model_copy(update={"devices": tuple(start.devices)})
            ends[job.id] = None if seconds is None else now + seconds
        waiting = [job for job in waiting if job.id not in starts]
        known = {job: end for job in running if (end := ends[job]) is not None}
        unknown = len(running) - len(known)
        if unknown or not known:  # any of the former may end first
            reason = f"{plural(unknown, 'job')} in front of it {'has' if unknown == 1 else 'have'} no estimate"
            reason = reason if unknown else "this machine has too few GPUs for it"
            return starts | {job.id: _Start(round(now, 1), reason) for job in waiting}
        first = min(known, key=lambda job: known[job])
        now = max(now, known[first])
        del running[first]
    return starts
