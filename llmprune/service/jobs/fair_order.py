"""Order in which waiting jobs start: by priority, then in turn for each owner, then in the order of arrival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from llmprune.service.jobs.job import Job


def in_turn(waiting: Sequence[Job], running: Iterable[Job]) -> list[Job]:
    """Order waiting jobs of equal priority so that an owner with fewer running and earlier jobs is first.

    The first job of an owner who runs nothing comes before the second job of any owner, so that many jobs of one user
    do not keep those of others waiting. ``waiting``: in the order of priority and arrival.
    """
    held = Counter(job.owner for job in running)
    before: Counter[tuple[int, str]] = Counter()
    turns: dict[str, int] = {}
    for job in waiting:
        place = (job.priority, job.owner)
        turns[job.id] = held[job.owner] + before[place]
        before[place] += 1
    return sorted(waiting, key=lambda job: (-job.priority, turns[job.id]))
