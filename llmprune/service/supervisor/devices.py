"""What this machine can give to jobs: GPUs, and slots for jobs that need none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.job import Job, JobSummary

PUSHES = 2  # at a time: they take no slot, for they wait for the network


def find_gpus() -> tuple[str, ...]:
    """The GPUs that the driver shows, by number; none where there is no driver."""
    return tuple(name for name in _driver_names() or () if name.isdecimal())


def choose_gpus(wish: str) -> tuple[str, ...]:
    """Return the GPUs of ``--gpus``, such as ``0,1``. Raises RecipeError where this machine does not have them."""
    chosen = tuple(name.strip() for name in wish.split(","))
    if chosen == ("none",):
        return ()
    twice = [name for name in dict.fromkeys(chosen) if chosen.count(name) > 1]
    if twice or not all(chosen):
        said = f"names {twice[0]!r} twice" if twice else "has an empty name"
        raise RecipeError(f"--gpus {wish!r} {said}; give each GPU once, such as 0,1, or none")
    known = _driver_names()
    if known is None:
        known = _torch_names()
    missing = [name for name in chosen if not _is_one_of(name, known)]
    if missing:
        there = ", ".join(name for name in known if name.isdecimal()) or "none"
        raise RecipeError(
            f"--gpus {wish!r}: this machine has no GPU {', '.join(missing)} (it has: {there}); "
            "give some that it has, or none"
        )
    return chosen


def _is_one_of(name: str, known: Sequence[str]) -> bool:
    """Whether a GPU is known by its number, or by the beginning of its UUID, as CUDA_VISIBLE_DEVICES takes them."""
    return name in known or (name.startswith(("GPU-", "MIG-")) and any(one.startswith(name) for one in known))


def _driver_names() -> list[str] | None:
    """Numbers and UUIDs of NVIDIA's GPUs and of their parts; None where nvidia-smi cannot be asked."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"^GPU (\d+):|\bUUID: ([\w/-]+)\)", answer.stdout, re.MULTILINE)
    return [name for names in found for name in names if name]


def _torch_names() -> list[str]:
    """Numbers of the GPUs that torch sees: those of another maker, or of a container without nvidia-smi.

    Asked of a process of its own, for the service itself stays without torch.
    """
    program = "import torch; print(torch.cuda.device_count())"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        return [str(number) for number in range(int(answer.stdout))]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


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
        self, waiting: Sequence[Job], running: Sequence[Job], *, elsewhere: Mapping[str, int]
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
