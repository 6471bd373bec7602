"""Metrics of the machine and of the queue for Prometheus, read from the job table at each scrape."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from llmprune import __version__
from llmprune.service.api.dependencies import Service
from llmprune.service.api.monitoring.status import queue_of
from llmprune.service.users.tokens import LOCAL


class MachineCollector(Collector):
    """Gauges of supervisor, slots, GPUs, waiting time and disk of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        yield InfoMetricFamily("llmprune_build", "Version of the service", value={"version": __version__})
        for name, help_text, value in self._values():
            yield GaugeMetricFamily(f"llmprune_{name}", help_text, value=value)

    def _values(self) -> Iterator[tuple[str, str, float]]:
        queue = queue_of(self.service, LOCAL)
        yield "supervisor_alive", "1 while the supervisor answers, else 0", queue.supervisor_alive
        yield "slots", "Jobs without a GPU that may run at a time", queue.slots
        yield "slots_used", "Jobs without a GPU that run", queue.slots_used
        yield "gpus", "GPUs for jobs", len(queue.devices)
        yield "gpus_used", "GPUs that a job holds", sum(device.busy for device in queue.devices)
        yield "queue_oldest_seconds", "Seconds that the oldest waiting job has waited; 0: none waits", self._oldest()
        yield "disk_quota_reached", "1 while the disk quota keeps waiting jobs from starting", queue.disk_quota_reached
        disk = shutil.disk_usage(self.service.settings.data_dir)
        yield "disk_free_bytes", "Free bytes of the data folder's disk", disk.free
        yield "disk_bytes", "Bytes of the data folder's disk", disk.total

    def _oldest(self) -> float:
        rows = self.service.database.read("SELECT min(created) AS oldest FROM jobs WHERE state = 'queued'")
        oldest = rows[0]["oldest"]
        return 0.0 if oldest is None else max(time.time() - oldest, 0.0)
