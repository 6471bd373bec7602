"""What this machine can give to jobs: GPUs, and slots for jobs that need none."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmprune.service.job import Job, JobSummary

PUSHES = 2  # at a time: they take no slot, for they wait for the network


def find_gpus() -> tuple[str, ...]:
    """The GPUs that the driver shows, by number; none where there is no driver."""
    question = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


@dataclass(frozen=True)
class Machine:
    """All GPUs and slots of this machine."""

    gpus: tuple[str, ...]
    slots: int

    def free_gpus(self, running: Iterable[Job]) -> list[str]:
        """Those that no running job holds."""
        taken = {device for job in running for device in job.devices}
        return [gpu for gpu in self.gpus if gpu not in taken]

    def startable(
        self, waiting: Sequence[Job], running: Sequence[Job], elsewhere: Mapping[str, int]
    ) -> list[tuple[Job, list[str]]]:
        """Which waiting jobs start now, each with its GPUs.

        The first in order goes first: where it must wait for GPUs, no later one takes them from it.
        Jobs of the launchers ``elsewhere`` take nothing from this machine; each takes so many more.
        """
        here = [job for job in running if takes_part(job, elsewhere)]
        gpus, slots = self.free_gpus(here), self.slots - sum(not job.gpus for job in here)
        pushes = PUSHES - sum(job.source is not None for job in running)
        chosen: list[tuple[Job, list[str]]] = []
        blocked, room = False, dict(elsewhere)
        for job in waiting:
            if job.source is not None:
                pushes -= 1
                if pushes >= 0:
                    chosen.append((job, []))
            elif job.launcher in room:
                room[job.launcher] -= 1
                if room[job.launcher] >= 0:
                    chosen.append((job, []))
            elif not job.gpus:
                slots -= 1
                if slots >= 0:
                    chosen.append((job, []))
            elif not blocked and len(gpus) >= job.gpus:
                chosen.append((job, gpus[: job.gpus]))
                gpus = gpus[job.gpus :]
            else:
                blocked = True
        return chosen


def takes_part(job: JobSummary, elsewhere: Collection[str]) -> bool:
    """Whether a job takes a slot or GPUs of this machine."""
    return job.launcher not in elsewhere and job.source is None
