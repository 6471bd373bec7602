"""Answers of a service without the service: for tests of its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx2 as httpx

from llmprune.service.cli.client import Client

JOB, OTHER = "0123456789ab", "ba9876543210"
URL = "http://service.test"
ENDED = {"id": JOB, "state": "succeeded", "ran_seconds": 1, "exit_code": 0, "error": None, "finished": 5.0}
LISTED = ENDED | {"name": "n", "owner": "o", "fraction": 1, "figures": None}
Answer = Callable[[httpx.Request], httpx.Response]


def talking_to(answer: Answer, pauses: list[float] | None = None) -> Client:
    """Return a client of a service that answers as given; its pauses are collected and not made."""
    pauses = [] if pauses is None else pauses
    return Client(URL, transport=httpx.MockTransport(answer), sleep=pauses.append)


def page(body: bytes = b"", status: int = 200, **headers: str) -> httpx.Response:
    """Return a streamed answer, as from a socket."""
    return httpx.Response(
        status, headers={name.replace("_", "-"): text for name, text in headers.items()}, content=_stream(body)
    )


def _stream(*parts: bytes) -> Iterator[bytes]:
    """Yield a body whose length is not known before."""
    yield from parts
