"""Server-sent events of a job as the client reads them, with limits on their size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx

from llmprune.common.schema import format_size
from llmprune.service.cli.answers import Answer, Event

LINE_LIMIT = 10**6  # bytes of a line


def events_of(response: httpx.Response, last: str) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed answer, each with its ``event`` and ``event_id``.

    ``last``: id of an event that has none. Raises ServiceError for an answer that is no stream of events.
    """
    head = Answer.head(response)
    kind = response.headers.get("Content-Type", "no content type")[:200]
    if not kind.startswith("text/event-stream"):
        raise head.unreadable(f"{kind} and no stream of events")
    fields: dict[str, str] = {}
    for line in lines_of(response):
        name, _, value = line.partition(":")
        if name in ("data", "event", "id"):
            fields[name] = value.removeprefix(" ")
        elif line:
            continue  # a comment, or a field that the service does not send
        elif "data" in fields:
            event = replace(head, body=fields["data"].encode()).json(Event)
            number = fields.get("id", last)
            if not re.fullmatch(r"\d{1,19}", number, re.ASCII):
                raise head.unreadable(f"an event with the id {number[:200]!r}")
            yield event | {"event": fields.get("event", "message"), "event_id": number}
            fields = {}


def lines_of(response: httpx.Response) -> Iterator[str]:
    """Read a streamed answer line by line. Raises ServiceError where a line is longer than ``LINE_LIMIT`` bytes."""
    pending: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield b"".join([*pending, line]).rstrip(b"\r").decode("utf-8", "replace")
            pending, size = [], 0
        pending.append(rest)
        size += len(rest)
        if size > LINE_LIMIT:
            raise Answer.head(response).unreadable(f"a line of more than {format_size(LINE_LIMIT)}")
