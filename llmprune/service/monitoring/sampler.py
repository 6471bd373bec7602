"""Sampler of what running jobs use: a thread of the supervisor, because a driver or a disk may answer slowly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress

import psutil

from llmprune.service.database.database import DatabaseError
from llmprune.service.jobs.job import ACTIVE, Job
from llmprune.service.jobs.store import JobStore
from llmprune.service.memory import memory_of
from llmprune.service.monitoring.gpu_use import gpu_use, use_of
from llmprune.service.monitoring.usage import UsageSample, read_usage, write_usage
from llmprune.service.ongoing_fault import OngoingFault
from llmprune.service.settings import Settings
from llmprune.service.supervisor.cleanup import used_bytes
from llmprune.service.supervisor.processes import processes_by_job

logger = logging.getLogger(__name__)

_ROUND_EVERY = 5.0  # seconds; of a job with many samples only some rounds are used
_DISK_EVERY = 30.0  # seconds between two sums of a job's files
_MAX_FILES_SECONDS = 1.0  # a sum that takes longer is made less often


class Sampler:
    """Takes samples of the running jobs of this machine."""

    def __init__(self, settings: Settings, jobs: JobStore, *, remote_launchers: Collection[str]) -> None:
        self.settings, self.jobs, self.remote = settings, jobs, frozenset(remote_launchers)
        self._cpu: dict[tuple[str, int], tuple[float, float]] = {}  # job and process: seconds of processors, and when
        self._disk: dict[str, tuple[float, int]] = {}  # job: when it was summed next, and the bytes

    def run(self, stop: threading.Event) -> None:
        """Take samples until ``stop`` is set."""
        fault = OngoingFault(logger, "the use of the machine cannot be measured")
        while not stop.wait(_ROUND_EVERY):
            try:
                self.sample()
            except (OSError, DatabaseError, psutil.Error) as error:
                fault.occurred(str(error), time.monotonic())
            else:
                fault.passed(time.monotonic())

    def sample(self) -> None:
        """Take a sample of every running job for which one is due."""
        jobs = self.jobs.in_states(*ACTIVE)
        if not jobs:
            return
        processes = processes_by_job()
        gpus = gpu_use() if any(job.devices for job in jobs) else []
        for job in jobs:
            folder = self.settings.folder(job.id)
            known = read_usage(folder)
            now = time.time()
            if not folder.is_dir() or (known.samples and 0 <= now - known.samples[-1].at < 0.8 * known.every):
                continue
            here = job.launcher not in self.remote
            own = processes.get(job.id, []) if here else []
            sample = UsageSample(
                at=round(now, 2),
                cpu=self._processors(job, own) if here else None,
                memory=memory_of(own) if here else None,
                disk=self._files(job),
                gpus=use_of(job.devices, gpus) if here else (),
            )
            with suppress(OSError):  # a full disk, or the job was deleted
                write_usage(folder, known.with_sample(sample))
        self._forget(jobs)

    def _processors(self, job: Job, processes: Iterable[psutil.Process]) -> float | None:
        """Return the use of the processors since the last sample in percent; None for the first one."""
        now, used, since = time.monotonic(), 0.0, None
        for process in processes:
            with suppress(psutil.Error):
                times = process.cpu_times()
                total, key = times.user + times.system, (job.id, process.pid)
                before = self._cpu.get(key)
                self._cpu[key] = total, now
                if before is not None:
                    used += max(total - before[0], 0.0)
                    since = before[1] if since is None else min(since, before[1])
        return None if since is None or now <= since else round(100 * used / (now - since), 1)

    def _files(self, job: Job) -> int:
        """Return the bytes of a job's folder, summed anew from time to time."""
        due, size = self._disk.get(job.id, (0.0, 0))
        began = time.monotonic()
        if began >= due:
            size = used_bytes(self.settings.folder(job.id))
            took = time.monotonic() - began
            pause = _DISK_EVERY * max(1.0, took / _MAX_FILES_SECONDS)
            self._disk[job.id] = time.monotonic() + pause, size
        return size

    def _forget(self, jobs: Iterable[Job]) -> None:
        running = {job.id for job in jobs}
        self._cpu = {key: value for key, value in self._cpu.items() if key[0] in running}
        self._disk = {job: value for job, value in self._disk.items() if job in running}
