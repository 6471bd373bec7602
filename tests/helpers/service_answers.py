"""Answers of a service without the service: for tests of its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx

from llmprune.service.client.sync.client import Client
from llmprune.service.jobs.job import Job, JobSummary

JOB, OTHER = "0123456789ab", "ba9876543210"
URL = "http://service.test"
ENDED: dict[str, Any] = dict.fromkeys(Job.model_fields) | {
    "id": JOB, "state": "succeeded", "ran_seconds": 1.0, "ran_before": 0.0, "exit_code": 0, "finished": 5.0,
    "name": "n", "owner": "o", "model": "org/model", "fraction": 1.0, "launcher": "local", "gpus": 0, "devices": [],
    "priority": 0, "attempts": 1, "shared": False, "cleaned": False, "uploaded": False,
    "created": 1.0, "seq": 1, "overrides": [],
    "recipe": "model: {id: org/model}",
}  # fmt: skip
LISTED = {name: value for name, value in ENDED.items() if name in JobSummary.model_fields}
PAGE: dict[str, Any] = {"jobs": [LISTED], "next": None, "counts": {}}
QUEUE: dict[str, Any] = {
    "counts": {}, "slots": 1, "slots_used": 0, "devices": [], "launchers": ["local"],
    "supervisor_alive": True, "disk_quota_reached": False,
}  # fmt: skip
EVENT: dict[str, Any] = {"id": JOB, "state": "running", "fraction": 0.0}
Answer = Callable[[httpx.Request], httpx.Response]


def talking_to(answer: Answer, pauses: list[float] | None = None) -> Client:
    """Return a client of a service that answers as given; its pauses are collected and not made."""
    pauses = [] if pauses is None else pauses
    return Client(URL, transport=httpx.MockTransport(answer), pause=pauses.append)


def page(body: bytes = b"", status: int = 200, **headers: str) -> httpx.Response:
    """Return a streamed answer, as from a socket."""
    return httpx.Response(
        status, headers={name.replace("_", "-"): text for name, text in headers.items()}, content=_stream(body)
    )


def _stream(*parts: bytes) -> Iterator[bytes]:
    """Yield a body whose length is not known before."""
    yield from parts
