"""A cluster for tests that answers like Ray's job API and runs its jobs as processes of this machine.

Each node has a folder of its own, and none sees another's. A test kills a node with everything that runs on it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx


@dataclass
class Node:
    """A node: its folder, its GPUs, and whether it is alive."""

    folder: Path
    gpus: int = 2
    alive: bool = True

    @property
    def name(self) -> str:
        """Id and address of the node."""
        return self.folder.name


@dataclass
class Job:
    """A job on a node; waiting while it has no process."""

    body: dict[str, Any]
    node: Node | None = None
    process: subprocess.Popen[bytes] | None = None


@dataclass
class SimulatedCluster:
    """The cluster: pass it to ``answer_requests``. ``environment``: variables of all nodes."""

    nodes: list[Node]
    environment: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer a request."""
        path = request.url.path.rstrip("/")
        if path == "/api/v0/nodes":
            listed = [
                {"node_id": node.name, "node_ip": node.name, "state": "ALIVE" if node.alive else "DEAD",
                 "resources_total": {"CPU": 2.0, "GPU": float(node.gpus)}}
                for node in self.nodes
            ]  # fmt: skip
            return httpx.Response(200, json={"data": {"result": {"result": listed}}})
        if request.method == "POST" and path == "/api/jobs":
            body = json.loads(request.content)
            self.jobs[body["submission_id"]] = Job(body)
            self._place()
            return httpx.Response(200, json={"submission_id": body["submission_id"]})
        if path.startswith("/api/jobs/"):
            job = self.jobs.get(path.split("/")[3])
            if job is None:
                return httpx.Response(404, text="no such job")
            if path.endswith("/stop") and job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGTERM)
            self._place()
            return httpx.Response(200, json=self._details(job))
        return httpx.Response(200, json={})

    def kill(self, node: Node) -> None:
        """Kill a node: its jobs, and later answers about it."""
        node.alive = False
        for job in self.jobs.values():
            if job.node is node and job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()

    def close(self) -> None:
        """Kill what is left."""
        for node in self.nodes:
            self.kill(node)

    def node_of(self, job: str) -> Node | None:
        """Return the node of the newest attempt at a job."""
        names = [name for name in self.jobs if name.startswith(f"llmprune-{job}-")]
        return self.jobs[names[-1]].node if names else None

    def _place(self) -> None:
        """Start each waiting job on the first living node that has enough GPUs."""
        for job in self.jobs.values():
            if job.process is not None:
                continue
            job.node = next(
                (one for one in self.nodes if one.alive and one.gpus >= job.body["entrypoint_num_gpus"]), None
            )
            if job.node is not None:
                job.node.folder.mkdir(parents=True, exist_ok=True)
                own = {"LLMPRUNE_NODE_FOLDER": str(job.node.folder), **job.body["runtime_env"]["env_vars"]}
                with (job.node.folder / "driver.log").open("ab") as log:
                    job.process = subprocess.Popen(
                        ["sh", "-c", job.body["entrypoint"]], env={**os.environ, **self.environment, **own},
                        stdout=log, stderr=log, start_new_session=True,
                    )  # fmt: skip

    def _details(self, job: Job) -> dict[str, Any]:
        node = {"driver_node_id": job.node.name if job.node else None}
        if job.process is None:
            return {"status": "PENDING", **node}
        if job.node is not None and not job.node.alive:
            return {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "its node died", **node}
        code = job.process.poll()
        if code is None:
            return {"status": "RUNNING", **node}
        return {"status": "SUCCEEDED" if code == 0 else "FAILED", "driver_exit_code": code, **node}
