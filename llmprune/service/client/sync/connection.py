# Made from aio/connection.py by make client; change that file.
"""Connection to a service: requests with repetition, streams of events, downloads that continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx

from llmprune.common.errors import LLMPruneError, OutputError
from llmprune.common.waiting import announce_wait
from llmprune.service.client import answers
from llmprune.service.client.answers import Answer, SizeLimit
from llmprune.service.client.calls import Call, R
from llmprune.service.client.downloads import Download
from llmprune.service.client.event_stream import Event, EventReader
from llmprune.service.client.server import Attempts, Server
from llmprune.service.client.sync.io import Pause, in_thread, sleep


class Connection:
    """A connection to a service. ``pause`` waits between two attempts, and ``transport`` replaces the network."""

    def __init__(
        self,
        server: Server,
        *,
        timeout: float,
        transport: httpx.BaseTransport | None = None,
        pause: Pause | None = None,
    ) -> None:
        self.server = server
        self.pause: Pause = pause or sleep
        try:
            self.http = httpx.Client(**server.http_options(timeout, transport))
        except (httpx.InvalidURL, ValueError) as error:
            raise server.invalid(error) from error

    def ask(self, call: Call[R]) -> R:
        """Return the value that the service answers."""
        return self.answer(call).json(call.shape)

    def answer(self, call: Call[R]) -> Answer:
        """Return the answer. A call is repeated where the connection breaks, and where the service is busy."""
        attempts = Attempts(self.server)
        while True:
            try:
                with announce_wait(self.server.address, f"{call.method} {call.path}"):
                    with self.http.stream(call.method, call.path, **call.options()) as response:
                        answer = _read(response)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                self.pause(attempts.after_break(error))
                continue
            if response.is_success:
                return answer
            self.pause(attempts.after_refusal(answer))

    def events(self, path: str, last: int) -> Iterator[Event]:
        """Yield the events of one stream after the event ``last``, until it ends or breaks (httpx.TransportError)."""
        with self._streamed(path, {"Last-Event-ID": str(last), "Accept": "text/event-stream"}) as response:
            reader = EventReader(response, last)
            for part in response.iter_bytes():
                for event in reader.events(part):
                    yield event

    def download(self, path: str, into: Download) -> None:
        """Download a file, and continue where the connection breaks. Raises OutputError, ServiceError.

        What is there of an unfinished download stays for the next one, unless it cannot be of this file.
        """
        try:
            if in_thread(into.is_here):
                return
            into.begin()
            try:
                head = self._receive(path, into)
                in_thread(into.finish, head)
            except LLMPruneError as error:
                if not into.continues or not isinstance(error.__cause__, httpx.TransportError):
                    into.partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OutputError(f"{into.path} cannot be written: {error}; choose another --output") from error

    def _receive(self, path: str, into: Download) -> Answer:
        """Receive a file, in as many attempts as it takes; return the head of the last answer."""
        attempts = Attempts(self.server)
        while True:
            before = into.have
            try:
                with self.http.stream("GET", path, headers=into.headers()) as response:
                    if response.is_success:
                        with into.receiving(response) as (file, limit):
                            for part in response.iter_bytes():
                                file.write(limit.passed(part))
                        return Answer.head(response)
                    refused = _read(response)
            except httpx.TransportError as error:
                if into.have > before:
                    attempts.succeeded()
                self.pause(attempts.after_break(error))
                continue
            self.pause(attempts.after_refusal(refused))

    @contextmanager
    def _streamed(self, path: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Yield an answer without its body. Raises what it reports where it is a refusal."""
        with self.http.stream("GET", path, headers=headers) as response:
            if not response.is_success:
                raise _read(response).refusal()
            yield response


def _read(response: httpx.Response) -> Answer:
    """Read a streamed answer. Raises ServiceError above ``BODY_LIMIT`` bytes, and httpx.TransportError."""
    head, limit = Answer.head(response), SizeLimit(response, answers.BODY_LIMIT)
    parts = [limit.passed(part) for part in response.iter_bytes()]
    return Answer(head.method, head.url, head.status, head.headers, b"".join(parts))
