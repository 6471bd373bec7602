"""Limits on connections that keep the server busy without a complete request.

A uvicorn protocol with a time limit for each phase of a request, and a register of the connections that wait for a
request. Where one address, or all addresses together, have too many, the register closes the connection that has waited
longest instead of the new one, so that health checks are always answered. The middleware in
``service/api/access/auth.py`` limits how many requests of an address are answered at a time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import re
import resource
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

BACKLOG = 128  # connections that asyncio accepts at once, before any of them can be closed
_MAX_WAITING = 32  # of one address; a browser opens 6
_MAX_OF_ADDRESS = 192  # including those with a request or a stream under way
_MAX_CONNECTIONS = 4096
_OTHER_FILES = 256  # open files of the process: job table, logs, downloads
_REPORT_EVERY = 60.0  # seconds between two log lines about closed connections
_PIECE = 1024  # bytes that h11 parses at once: a kilobyte of the smallest chunks takes 10 ms
_MAX_LINES = 100  # of headers
_MAX_BYTES = 256 * 1024  # of a request's body
_UPLOAD = re.compile(r"PUT /v1/models/uploads/[0-9a-f]{12}/files/.+|POST /models/upload")  # may have large bodies
_UPLOAD_PIECE = 64 * 1024  # bytes that h11 parses at once of such a body: without chunks it copies them
_LINGER = 1.0  # seconds for a client to read why its body was refused

Phase = Literal["headers", "body", "answer"]


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a client may take for each phase of a request."""

    headers: float = 10.0  # from the connection or the last answer to the end of the headers
    body: float = 30.0  # of an upload: without a further byte
    reading: float = 60.0  # without reading a byte of an answer


@dataclass
class Register:
    """The connections of one server."""

    timeouts: Timeouts = Timeouts()
    trusted: Sequence[str] = ()  # addresses and networks of proxies, which open connections for many clients
    max_waiting: int = _MAX_WAITING
    max_of_address: int = _MAX_OF_ADDRESS
    max_connections: int = _MAX_CONNECTIONS
    _all: Counter[str] = field(default_factory=Counter)  # by address
    _waiting: dict[str, OrderedDict[LimitedProtocol, None]] = field(default_factory=dict)  # by address, oldest first
    _closed: Counter[str] = field(default_factory=Counter)

    def opened(self, connection: LimitedProtocol) -> None:
        """Count a new connection. Above a limit, close one of this or of the busiest address."""
        address = connection.address
        self._all[address] += 1
        if self._all[address] > self.max_of_address and not is_among(address, self.trusted):
            self._close(next(iter(self._waiting.get(address, ())), connection), "too many connections of one address")
        elif self._all.total() > self.max_connections:
            largest = max(self._waiting.values(), key=len, default=OrderedDict({connection: None}))
            self._close(next(iter(largest)), "too many connections")

    def waits(self, connection: LimitedProtocol) -> None:
        """Add a connection that waits for a request; above the limit, close the oldest one of its address."""
        waiting = self._waiting.setdefault(connection.address, OrderedDict())
        waiting[connection] = None
        if len(waiting) > self.max_waiting and not is_among(connection.address, self.trusted):
            self._close(next(iter(waiting)), "too many connections of one address")

    def works(self, connection: LimitedProtocol) -> None:
        """Remove a connection that no longer waits."""
        waiting = self._waiting.get(connection.address, OrderedDict())
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def lost(self, connection: LimitedProtocol) -> None:
        """Remove a closed connection."""
        self.works(connection)
        self._all[connection.address] -= 1
        if not self._all[connection.address]:
            del self._all[connection.address]

    def timed_out(self, connection: LimitedProtocol) -> None:
        """Close a connection that exceeded a time limit."""
        self._close(connection, "too slow")

    def _close(self, connection: LimitedProtocol, reason: str) -> None:
        if not self._closed:  # a flood of connections must not become a flood of lines
            connection.loop.call_later(_REPORT_EVERY, self._report)
        self._closed[reason] += 1
        connection.abort()

    def _report(self) -> None:
        counts = ", ".join(f"{count} ({reason})" for reason, count in self._closed.items())
        logger.warning("connections closed in the last minute: %s", counts)
        self._closed.clear()


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with limits of time and size for each phase. It parses what it receives piece by piece."""

    def __init__(self, register: Register, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register = register
        self._phase: Phase = "answer"
        self._open = False
        self._timer: asyncio.TimerHandle | None = None
        self._unread = math.inf  # bytes of answers that the client had not read when the timer last expired
        self._arrived = 0  # bytes of an upload that had arrived then
        self._pending = bytearray()  # received and not parsed yet
        self._feeding = False  # _feed is scheduled
        self._discards = False  # drops everything else that the client sends
        self._lines, self._bytes = 0, 0  # of the request's headers and body

    @property
    def address(self) -> str:
        """Address of the client."""
        return self.client[0] if self.client else "?"

    def abort(self) -> None:
        """Close the connection at once."""
        self._forget()
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first request."""
        super().connection_made(transport)
        self._open = True
        self._register.opened(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse one piece of the data now, and the others in turn with the other work of the event loop."""
        if not self._discards:
            self._pending += data
            if not self._feeding:
                self._feed()

    def on_response_complete(self) -> None:
        """Wait for the next request; after a refused body, only until its client has had time to read why."""
        super().on_response_complete()
        self._watch()
        self._end_if_discarding()
        self._feed_later()

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read its answer."""
        super().pause_writing()
        if self._phase == "answer":
            self._start(self._register.timeouts.reading)

    def resume_writing(self) -> None:
        """Stop the timer of an answer that is read again."""
        super().resume_writing()
        if self._phase == "answer":
            self._stop()

    def _feed_later(self) -> None:
        if self._pending and not self._feeding:
            self._feeding = True
            self.loop.call_soon(self._feed)

    def _feed(self) -> None:
        """Have h11 parse one piece. Data that arrives while a request is answered waits, and so does its client."""
        self._feeding = False
        if not self._pending or self._discards or not self._open or self.transport.is_closing():
            return
        if self._phase == "answer":
            return self.flow.pause_reading()
        size = _PIECE
        if self._is_upload():  # no more than its body, so that what follows is parsed in small pieces
            size = min(_UPLOAD_PIECE, max(_PIECE, _length_of(self.headers) - self._bytes))
        piece = bytes(self._pending[:size])
        del self._pending[:size]
        in_headers = self.conn.their_state is h11.IDLE
        if in_headers:
            self._lines += piece.count(b"\n")
            if self._lines > _MAX_LINES:
                return self.send_400_response("Too many header lines.")
        super().data_received(piece)
        self._bytes = 0 if in_headers else self._bytes + len(piece)
        if self.conn.their_state is not h11.IDLE:
            self._lines = 0
        is_long = self._bytes > _MAX_BYTES and not self._is_upload()
        if self.conn.their_state is h11.SEND_BODY and (is_long or _is_chunked(self.headers)):
            self._discards = True
            self._pending.clear()
        self._watch()
        self._end_if_discarding()
        self._feed_later()

    def _is_upload(self) -> bool:
        """Return whether an upload is under way that has not been answered."""
        if self.cycle is None or self.cycle.response_complete or self.conn.their_state is not h11.SEND_BODY:
            return False
        return _UPLOAD.fullmatch(f"{self.cycle.scope['method']} {self.cycle.scope['path']}") is not None

    def _end_if_discarding(self) -> None:
        """Close a connection with a refused body, once its client has had time to read why."""
        if self._discards and self._phase == "headers":
            self.loop.call_later(_LINGER, self.transport.close)

    def _watch(self) -> None:
        """Set the timer where a new phase has begun. The rest of a refused body counts as waiting for a request."""
        answering = self.cycle is not None and not self.cycle.response_complete
        phase: Phase = "headers"
        if answering:
            phase = "body" if self.conn.their_state is h11.SEND_BODY else "answer"
        if phase == self._phase or not self._open:
            return
        self._phase = phase
        if phase == "headers":
            self._register.waits(self)
            self._start(self._register.timeouts.headers)
        else:
            self._register.works(self)
            if phase == "body":
                self._start(self._register.timeouts.body)
            else:
                self._stop()

    def _forget(self) -> None:
        self._stop()
        if self._open:
            self._open = False
            self._register.lost(self)

    def _start(self, seconds: float) -> None:
        self._stop()
        self._unread, self._arrived = math.inf, 0
        self._timer = self.loop.call_later(seconds, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        """Close the connection, unless the client still reads an answer or sends an upload, however slowly."""
        unread = self.transport.get_write_buffer_size()
        if self._is_upload() and (self._bytes > self._arrived or self.flow.read_paused):  # paused: the disk is slow
            self._arrived = self._bytes
            self._timer = self.loop.call_later(self._register.timeouts.body, self._expired)
        elif unread and unread < self._unread:
            self._unread = unread
            self._timer = self.loop.call_later(self._register.timeouts.reading, self._expired)
        else:
            self._register.timed_out(self)


def _length_of(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Return the bytes of a body that its headers announce; h11 has checked them."""
    return next((int(value) for name, value in headers if name == b"content-length"), 0)


def _is_chunked(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a body is chunked. The middleware refuses it: parsing the smallest chunks takes seconds."""
    return any(name == b"transfer-encoding" for name, _ in headers)


def is_among(address: str, networks: Sequence[str]) -> bool:
    """Return whether an IP address is one of these addresses or in one of these networks."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network, strict=False) for network in networks)


def max_connections() -> int:
    """Raise this process's limit on open files as far as possible; return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + BACKLOG + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, wanted - BACKLOG - _OTHER_FILES)
