"""Server-sent events of a job as the client reads them, with limits on their size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import httpx2 as httpx
from pydantic import Field

from llmprune.common.schema import format_size
from llmprune.service.api.values import JobEvent
from llmprune.service.client.answers import Answer

LINE_LIMIT = 10**6  # bytes of a line


class Event(JobEvent):
    """A change of a job, with its place in the job's stream of events."""

    event_id: int = Field(description="Number of the event; a later stream can continue after it.")
    kind: str = Field(description="state, or the topic of another change.")


class EventReader:
    """Events of a streamed answer, made of its parts as they arrive. ``last``: id of an event that has none.

    Raises ServiceError for an answer that is no stream of events.
    """

    def __init__(self, response: httpx.Response, last: int) -> None:
        self._head, self._response, self._last = Answer.head(response), response, last
        kind = response.headers.get("Content-Type", "no content type")[:200]
        if not kind.startswith("text/event-stream"):
            raise self._head.unreadable(f"{kind} and no stream of events")
        self._pending, self._size = [b""], 0  # parts of an unfinished line, and their bytes
        self._fields: dict[str, str] = {}  # of an unfinished event

    def events(self, part: bytes) -> Iterator[Event]:
        """Yield the events that a part completes."""
        for line in self._lines(part):
            name, _, value = line.partition(":")
            if name in ("data", "event", "id"):
                self._fields[name] = value.removeprefix(" ")
            elif not line and "data" in self._fields:
                yield self._event()
                self._fields = {}

    def _event(self) -> Event:
        known = replace(self._head, body=self._fields["data"].encode()).json(JobEvent)
        number = self._fields.get("id", str(self._last))
        if not re.fullmatch(r"\d{1,19}", number, re.ASCII):
            raise self._head.unreadable(f"an event with the id {number[:200]!r}")
        return Event(**known.model_dump(), event_id=int(number), kind=self._fields.get("event", "message"))

    def _lines(self, part: bytes) -> Iterator[str]:
        """Yield the lines that a part completes. Raises ServiceError where one is longer than ``LINE_LIMIT`` bytes."""
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield b"".join([*self._pending, line]).rstrip(b"\r").decode("utf-8", "replace")
            self._pending, self._size = [], 0
        self._pending.append(rest)
        self._size += len(rest)
        if self._size > LINE_LIMIT:
            raise Answer.head(self._response).unreadable(f"a line of more than {format_size(LINE_LIMIT)}")
