"""Connections that keep a server busy without asking anything: each phase of a request has a time limit.

A uvicorn protocol with a timer a connection, and a register of the connections that wait for a request. Where an
address, or all addresses together, have too many, the register closes the longest waiting one and not the new one, so
that health checks are answered whoever else holds connections. How many requests an address may have under way is
the gate's to limit (service/api/gate.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import resource
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

BACKLOG = 128  # connections that asyncio accepts in one go, before any of them can be closed
_MOST_WAITING = 32  # of one address; a browser holds 6
_MOST_OF_ADDRESS = 192  # those with a request or a stream under way included
_MOST_CONNECTIONS = 4096
_OTHER_FILES = 256  # that the process holds open: job table, logs, downloads
_REPORT_EVERY = 60.0  # seconds between two lines of the log about connections that were closed
_PIECE = 1024  # bytes that h11 parses in one go: a kilobyte of smallest chunks takes it 10 ms
_MOST_LINES = 100  # of headers
_MOST_BYTES = 256 * 1024  # of a request's body
_LINGER = 1.0  # seconds in which a client whose body was refused may read why

Phase = Literal["headers", "body", "answer"]


@dataclass(frozen=True)
class Patience:
    """Seconds that a client may take for each phase of a request."""

    headers: float = 10.0  # from the connection, or the last answer, to the end of the headers
    body: float = 30.0
    reading: float = 60.0  # without taking a byte of an answer


@dataclass
class Register:
    """The connections of one server."""

    patience: Patience = Patience()
    trusted: Sequence[str] = ()  # addresses and networks of proxies, which hold connections for many clients
    most_waiting: int = _MOST_WAITING
    most_of_address: int = _MOST_OF_ADDRESS
    most: int = _MOST_CONNECTIONS
    _all: Counter[str] = field(default_factory=Counter)  # by address
    _waiting: dict[str, OrderedDict[LimitedProtocol, None]] = field(default_factory=dict)  # by address, oldest first
    _closed: Counter[str] = field(default_factory=Counter)

    def opened(self, connection: LimitedProtocol) -> None:
        """Count a new connection; where there are too many, close one of the address with the most waiting ones."""
        address = connection.address
        self._all[address] += 1
        if self._all[address] > self.most_of_address and not is_among(address, self.trusted):
            self._close(next(iter(self._waiting.get(address, ())), connection), "too many connections of one address")
        elif self._all.total() > self.most:
            crowd = max(self._waiting.values(), key=len, default=OrderedDict({connection: None}))
            self._close(next(iter(crowd)), "too many connections")

    def waits(self, connection: LimitedProtocol) -> None:
        """Note that a connection waits for a request; close the longest waiting one of its address if need be."""
        waiting = self._waiting.setdefault(connection.address, OrderedDict())
        waiting[connection] = None
        if len(waiting) > self.most_waiting and not is_among(connection.address, self.trusted):
            self._close(next(iter(waiting)), "too many connections of one address")

    def works(self, connection: LimitedProtocol) -> None:
        """Note that a connection does not wait."""
        waiting = self._waiting.get(connection.address, OrderedDict())
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def lost(self, connection: LimitedProtocol) -> None:
        """Forget a connection."""
        self.works(connection)
        self._all[connection.address] -= 1
        if not self._all[connection.address]:
            del self._all[connection.address]

    def timed_out(self, connection: LimitedProtocol) -> None:
        """Close a connection that took longer than it may."""
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
    """uvicorn's protocol with limits of time and size for each phase, fed piece by piece."""

    def __init__(self, register: Register, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register = register
        self._phase: Phase = "answer"
        self._open = False
        self._timer: asyncio.TimerHandle | None = None
        self._unread = math.inf  # bytes of answers that the client had not taken when the timer was last looked at
        self._pending = bytearray()  # received, and not parsed yet
        self._feeding = False  # whether _feed is to be called
        self._deaf = False  # whether the rest of what the client sends is dropped
        self._lines, self._bytes = 0, 0  # of the request's headers and body

    @property
    def address(self) -> str:
        """The address at the other end."""
        return self.client[0] if self.client else "?"

    def abort(self) -> None:
        """Close the connection at once."""
        self._forget()
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._open = True
        self._register.opened(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, a piece now and others in turn with the other work of the loop."""
        if not self._deaf:
            self._pending += data
            if not self._feeding:
                self._feed()

    def on_response_complete(self) -> None:
        """Wait for the next request; after a body that was refused, only as long as its client may need to read why."""
        super().on_response_complete()
        self._watch()
        self._end_if_deaf()
        self._feed_later()

    def pause_writing(self) -> None:
        """Start the clock for a client that does not read its answer."""
        super().pause_writing()
        if self._phase == "answer":
            self._start(self._register.patience.reading)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        if self._phase == "answer":
            self._stop()

    def _feed_later(self) -> None:
        if self._pending and not self._feeding:
            self._feeding = True
            self.loop.call_soon(self._feed)

    def _feed(self) -> None:
        """Have h11 parse one piece. What comes while a request is answered waits, and the client with it."""
        self._feeding = False
        if not self._pending or self._deaf or not self._open or self.transport.is_closing():
            return
        if self._phase == "answer":
            return self.flow.pause_reading()
        piece = bytes(self._pending[:_PIECE])
        del self._pending[:_PIECE]
        in_headers = self.conn.their_state is h11.IDLE
        if in_headers:
            self._lines += piece.count(b"\n")
            if self._lines > _MOST_LINES:
                return self.send_400_response("Too many header lines.")
        super().data_received(piece)
        self._bytes = 0 if in_headers else self._bytes + len(piece)
        if self.conn.their_state is not h11.IDLE:
            self._lines = 0
        if self.conn.their_state is h11.SEND_BODY and (self._bytes > _MOST_BYTES or _is_chunked(self.headers)):
            self._deaf = True
            self._pending.clear()
        self._watch()
        self._end_if_deaf()
        self._feed_later()

    def _end_if_deaf(self) -> None:
        """Close a connection whose body was refused, once its client has had time to read why."""
        if self._deaf and self._phase == "headers":
            self.loop.call_later(_LINGER, self.transport.close)

    def _watch(self) -> None:
        """Set the clock where another phase has begun; the rest of a refused body is a wait for the next request."""
        answering = self.cycle is not None and not self.cycle.response_complete
        phase: Phase = "headers"
        if answering:
            phase = "body" if self.conn.their_state is h11.SEND_BODY else "answer"
        if phase == self._phase or not self._open:
            return
        self._phase = phase
        if phase == "headers":
            self._register.waits(self)
            self._start(self._register.patience.headers)
        else:
            self._register.works(self)
            if phase == "body":
                self._start(self._register.patience.body)
            else:
                self._stop()

    def _forget(self) -> None:
        self._stop()
        if self._open:
            self._open = False
            self._register.lost(self)

    def _start(self, seconds: float) -> None:
        self._stop()
        self._unread = math.inf
        self._timer = self.loop.call_later(seconds, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        """Close the connection, unless the client is still taking bytes of an answer, however slowly."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread < self._unread:
            self._unread = unread
            self._timer = self.loop.call_later(self._register.patience.reading, self._expired)
        else:
            self._register.timed_out(self)


def _is_chunked(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a body comes in chunks. The gate refuses it: to parse the smallest chunks takes seconds."""
    return any(name == b"transfer-encoding" for name, _ in headers)


def is_among(address: str, networks: Sequence[str]) -> bool:
    """Return whether an IP address is one of these addresses or in one of these networks."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network, strict=False) for network in networks)


def most_connections() -> int:
    """Raise this process's limit of open files as far as it may; return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + BACKLOG + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, wanted - BACKLOG - _OTHER_FILES)
