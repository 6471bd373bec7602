"""A real Ray cluster of several nodes on this machine: a head without GPUs, and nodes with pretended GPUs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from helpers.service import free_port

_SECONDS = 90.0  # for a node to come up on a busy machine


@dataclass
class Cluster:
    """Processes of ``ray start``, each in a session of its own. ``folder``: short, because sockets lie there."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)  # of head and nodes
    port: int = field(default_factory=free_port)
    gcs: int = field(default_factory=free_port)
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # by node id
    head: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Address of its job API."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, gpus: int, **environment: str) -> bool:
        """Start head and one node, the latter with further variables; return False where they do not come up.

        Tries twice, because Ray's node gives up when its agent takes 15 seconds.
        """
        options = (f"--port={self.gcs}", f"--temp-dir={self.folder}", f"--dashboard-port={self.port}")
        for _ in range(2):
            self.head = self._begin("--head", "--dashboard-host=127.0.0.1", "--num-gpus=0", *options)
            if self._new_node(self.head, known=set()) is not None:
                return self.add_node(gpus=gpus, **environment)
            self.stop()
        return False

    def add_node(self, gpus: int, **environment: str) -> bool:
        """Start a node and wait until jobs can run on it; return False where it does not come up."""
        for _ in range(2):
            known = set(self.alive())
            process = self._begin(f"--address=127.0.0.1:{self.gcs}", f"--num-gpus={gpus}", **environment)
            node = self._new_node(process, known=known)
            if node is not None:
                self.workers[node] = process
                return True
            _kill(process)
        return False

    def kill(self, node: str) -> None:
        """Kill a node with everything that runs on it, as a power cut would."""
        _kill(self.workers.pop(node))

    def alive(self) -> list[str]:
        """Return the ids of the living nodes, the head's included."""
        try:
            accepts = httpx.get(f"{self.address}/api/jobs/", timeout=10)
            answer = httpx.get(f"{self.address}/api/v0/nodes", timeout=10)
            is_up = accepts.is_success and answer.is_success
            listed: list[dict[str, Any]] = answer.json()["data"]["result"]["result"] if is_up else []
        except (httpx.TransportError, ValueError, TypeError, KeyError):
            return []
        return [node["node_id"] for node in listed if node["state"] == "ALIVE"]

    def said(self) -> str:
        """Return the end of what the processes printed."""
        return (self.folder / "said").read_text()[-2000:]

    def stop(self) -> None:
        """End every process."""
        for process in (*self.workers.values(), *([self.head] if self.head else [])):
            _kill(process)
        self.workers.clear()

    def _begin(self, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=80000000", *options]
        command += [f"--dashboard-agent-listen-port={free_port()}"]  # by default all agents of a machine want the same
        faster = {"RAY_health_check_period_ms": "500", "RAY_enable_metrics_collection": "0"}
        with (self.folder / "said").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **self.environment, **environment, **faster},
            )  # fmt: skip

    def _new_node(self, process: subprocess.Popen[bytes], known: set[str]) -> str | None:
        """Return the id of the node that a process adds, once the head lists it; None where it ends before."""
        deadline = time.monotonic() + _SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            new = [node for node in self.alive() if node not in known]
            if new:
                return new[0]
            time.sleep(0.3)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    if process.poll() is None:
        found = psutil.Process(process.pid)
        for part in (*found.children(recursive=True), found):
            with contextlib.suppress(psutil.NoSuchProcess):  # a part may end by itself once its parent is killed
                part.kill()
    process.wait(60)
