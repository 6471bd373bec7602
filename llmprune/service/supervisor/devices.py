"""GPUs of this machine, slots for jobs without a GPU, and the choice of the jobs that start next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.fair_order import in_turn
from llmprune.service.jobs.job import Job, JobSummary
from llmprune.service.users.quotas import Room

MAX_PUSHES = 2  # at a time; a push takes no slot, for it mostly waits for the network


def find_gpus() -> tuple[str, ...]:
    """Return the numbers of the GPUs that the driver lists; empty where there is no driver."""
    return tuple(name for name in _driver_names() or () if name.isdecimal())


def choose_gpus(option: str) -> tuple[str, ...]:
    """Return the GPUs of ``--gpus``, such as ``0,1``. Raises RecipeError where this machine does not have them."""
    chosen = tuple(name.strip() for name in option.split(","))
    if chosen == ("none",):
        return ()
    twice = [name for name in dict.fromkeys(chosen) if chosen.count(name) > 1]
    if twice or not all(chosen):
        mistake = f"names {twice[0]!r} twice" if twice else "has an empty name"
        raise RecipeError(f"--gpus {option!r} {mistake}; give each GPU once, such as 0,1, or none")
    known = _driver_names()
    if known is None:
        known = _torch_names()
    missing = [name for name in chosen if not _is_one_of(name, known)]
    if missing:
        there = ", ".join(name for name in known if name.isdecimal()) or "none"
        raise RecipeError(
            f"--gpus {option!r}: this machine has no GPU {', '.join(missing)} (it has: {there}); "
            "name some of those, or none"
        )
    return chosen


def _is_one_of(name: str, known: Sequence[str]) -> bool:
    """Return whether a name is the number of a GPU or a prefix of its UUID, as in CUDA_VISIBLE_DEVICES."""
    return name in known or (name.startswith(("GPU-", "MIG-")) and any(gpu.startswith(name) for gpu in known))


def _driver_names() -> list[str] | None:
    """Return numbers and UUIDs of NVIDIA GPUs and of their MIG partitions; None where nvidia-smi does not run."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"^GPU (\d+):|\bUUID: ([\w/-]+)\)", answer.stdout, re.MULTILINE)
    return [name for names in found for name in names if name]


def _torch_names() -> list[str]:
    """Return the numbers of the GPUs that torch sees: of other vendors, or in a container without nvidia-smi.

    A separate process imports torch, because the service itself must not.
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
class Start:
    """A job that starts now, and the GPUs that it gets."""

    job: Job
    devices: list[str]


@dataclass(frozen=True)
class Machine:
    """All GPUs and slots of this machine."""

    gpus: tuple[str, ...]
    slots: int

    def free_gpus(self, running: Iterable[Job]) -> list[str]:
        """Return the GPUs that no running job holds."""
        taken = {device for job in running for device in job.devices}
        return [gpu for gpu in self.gpus if gpu not in taken]

    def startable(
        self,
        waiting: Sequence[Job],
        running: Sequence[Job],
        *,
        remote_capacity: Mapping[str, int],
        room: Room | None = None,
    ) -> list[Start]:
        """Choose the waiting jobs that start now.

        Jobs start in the order of ``in_turn``: while a job waits for GPUs, no later job takes a GPU. A job that waits
        for its owner's other jobs by ``room``, the owner's quotas, holds nobody up.
        ``remote_capacity``: how many more jobs each remote launcher takes; they use nothing of this machine.
        """
        local = [job for job in running if uses_this_machine(job, remote_capacity)]
        gpus, slots = self.free_gpus(local), self.slots - sum(not job.gpus for job in local)
        pushes = MAX_PUSHES - sum(job.source is not None for job in running)
        chosen: list[Start] = []
        blocked, capacity = False, dict(remote_capacity)
        room = room or Room({}, running, disk={}, last={})
        for job in in_turn(waiting, running, last=room.last):
            if room.held(job):
                continue
            before = len(chosen)
            if job.source is not None:
                pushes -= 1
                if pushes >= 0:
                    chosen.append(Start(job, []))
            elif job.launcher in capacity:
                capacity[job.launcher] -= 1
                if capacity[job.launcher] >= 0:
                    chosen.append(Start(job, []))
            elif not job.gpus:
                slots -= 1
                if slots >= 0:
                    chosen.append(Start(job, []))
            elif not blocked and len(gpus) >= job.gpus:
                chosen.append(Start(job, gpus[: job.gpus]))
                gpus = gpus[job.gpus :]
            else:
                blocked = True
            if len(chosen) > before:
                room.take(job)
        return chosen


def uses_this_machine(job: JobSummary, remote_launchers: Collection[str]) -> bool:
    """Return whether a job takes a slot or GPUs of this machine."""
    return job.launcher not in remote_launchers and job.source is None
