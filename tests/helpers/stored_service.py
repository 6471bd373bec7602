"""A service with an artefact store, and a cluster whose nodes see nothing of the service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.ray_cluster import Node, SimulatedCluster
from helpers.service import ServiceHarness, answer_requests, recipe
from llmprune.service.artifacts import mirror
from llmprune.service.artifacts.manifest import Manifest, newest_manifest
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.jobs.job import ENDED
from llmprune.service.supervisor.launchers import ray
from llmprune.service.supervisor.launchers.ray_api import RayTiming


@dataclass
class Setting:
    """A service, its store, and a cluster of two nodes that see nothing of the service."""

    harness: ServiceHarness
    cluster: SimulatedCluster
    store: ArtifactStore

    def submit(self, gpus: int = 0, **behaviour: object) -> str:
        """Submit a job for the cluster and return its id."""
        return str(self.harness.submit(recipe(**behaviour), launcher="ray", gpus=gpus)["id"])

    def until_ended(self, job: str) -> dict[str, Any]:
        """Run rounds until the job has ended."""
        return self.harness.until(job, lambda found: found["state"] in ENDED, 60, pause=0.1)

    def wait(self, reached: Callable[[], object]) -> None:
        """Run rounds until a condition holds."""
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline
            self.harness.supervisor.round()
            time.sleep(0.1)

    def manifest(self, job: str) -> Manifest | None:
        """Return the newest manifest of a job in the store."""
        return newest_manifest(self.store, job)

    def layers(self, job: str) -> dict[str, bytes]:
        """Return the layers that the newest manifest lists."""
        found = self.manifest(job)
        files = found.files if found else ()
        return {file.name: self.store.read(file.key) or b"" for file in files if "/layer-" in file.name}


def make(folder: Path, url: str, patch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """Make a service with a store."""
    cluster = SimulatedCluster([Node(folder / "one"), Node(folder / "two", gpus=1)])
    answer_requests(patch, cluster)
    patch.setattr(ray, "_STORE_PAUSE", 0.1)
    patch.setattr(mirror, "_ASK_EVERY", 0.1)
    patch.setitem(ray.Ray.__init__.__kwdefaults__, "timing", RayTiming(poll_every=0.05, pause=0.1, nodes_every=0.1))
    yield Setting(
        ServiceHarness(folder, ray="http://head:8265", artifacts=url, memory_limit=None), cluster, ArtifactStore(url)
    )
    cluster.close()
